"""Random generators. All randomness is a function of a key, never of a global state.

A key is a tuple of integers and strings, such as ``(seed, step, sample, "noise")``. The same key gives the same
numbers on every machine, whatever the number of processes, the batch size, or what was drawn before.
"""

import hashlib

import torch
from accelerate.utils import set_seed


def generator(*key: int | str) -> torch.Generator:
    """Returns a generator for one purpose, seeded from the whole key.

    It is on the CPU, because noise that is drawn there and then moved is the same on every device.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def generators(indices, *key: int | str) -> list[torch.Generator]:
    """Returns one generator for each sample: sample ``j`` of ``indices`` gets the key ``(*key, j)``."""
    return [generator(*key, int(j)) for j in indices]


def seed_global(*key: int | str) -> None:
    """Seeds the global generators of Python, NumPy and torch. Only a user's own functions may draw from them."""
    set_seed(generator(*key).initial_seed() % 2**32)
