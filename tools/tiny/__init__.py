"""`tiny`: a tiny model and codec of the true architecture with random weights, for demos and tests."""
