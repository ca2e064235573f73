"""All randomness is a function of a key, never of a global state.

A key is a tuple of integers and strings, such as ``(seed, step, sample, "noise")``. The same key gives the same
numbers on every machine, whatever the number of processes, the batch size, or what was drawn before.
"""

import hashlib
import random

import numpy as np
import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one purpose, seeded from the whole key.

    CPU, because noise drawn there and then moved is the same on every device.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def generators(indices, *key: int | str) -> list[torch.Generator]:
    """One generator per sample: sample ``j`` of ``indices`` gets the key ``(*key, j)``."""
    return [generator(*key, int(j)) for j in indices]


def random_state() -> dict:
    """The global random states of this process, which a user's own reward may draw from; nothing here does."""
    numpy_state = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": list(random.getstate()),
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
    }


def restore_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
