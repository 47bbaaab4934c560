"""`bench`: speed of stage one, of data loading and of the training step, as ratios measured in one run."""
