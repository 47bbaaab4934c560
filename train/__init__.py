"""Stage two: shards -> LoRA adapter. The main path is `train/loop.py`."""
