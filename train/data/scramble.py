"""Numbers in an order that a seed decides, the same on every machine: numpy's generators promise only their bits."""

from __future__ import annotations

import numpy as np

MIX = np.uint64(0x9E3779B97F4A7C15)  # the 64-bit golden ratio: spreads seeds over the numbers


def scramble(numbers: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [n] -> uint64 [n], another order for every seed (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        x = numbers + MIX * np.uint64((seed + 1) & 0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
