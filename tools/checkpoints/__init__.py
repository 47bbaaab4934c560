"""`checkpoints`: what a run wrote, and what to do with it."""
