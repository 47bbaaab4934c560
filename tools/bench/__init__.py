"""`bench`: speed of stage one, of the data road and of the training step, as ratios measured in one run."""
