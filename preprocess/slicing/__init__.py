"""`preprocess slice`: raw recordings into clips, by the pauses of speech."""
