"""Stage one: ChatML and audio -> shards. The main path is `preprocess/run.py`."""
