"""RUN on disk: begin or go on, checkpoints, metrics. It knows nothing of `train.data` and `train.evaluation`."""
