"""From shards to packs on the device. `source.py` is what the loop asks for; it imports `train.model`, never the other wings."""
