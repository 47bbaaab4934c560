"""The DualFFN decoder over packed tokens, its LoRA, losses, generation and sharding. It imports no other wing of `train`."""
