"""`evaluate`: is the tuned model better than the base, for whom, and how sure are we. `cli.py` is the command."""
