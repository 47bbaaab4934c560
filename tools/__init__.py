"""Tools over both stages: inspect shards, manage checkpoints, speak, make tiny models. Nothing imports this package."""
