"""Every random draw comes from a named stream."""

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator for the named stream `key`, e.g. (seed, image index); equal keys give equal
    draws.

    Streams are named within their purpose: image i, Fisher bin i and training step i of one seed
    have the same key. Raises ValueError for a key that is no whole number of 0 or more.
    """
    for part in key:
        if not isinstance(part, int | np.integer) or part < 0:
            raise ValueError(f"a seed is {part!r}: give a whole number of 0 or more")
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
