"""Frozen networks whose outputs the shards hold, codec and Whisper tower: the only files of `shards` that import torch."""
