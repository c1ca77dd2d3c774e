"""Every random draw comes from a named stream."""

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator for the named stream `key`, e.g. (seed, image index); equal keys give equal
    draws.

    Streams are named within their purpose: image i, Fisher bin i and training step i of one seed
    have the same key.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
