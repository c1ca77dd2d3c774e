"""What to say when a batch is too large for the memory of the device."""

from collections.abc import Callable

import torch


def too_large(batch: int, parameter: str, attempt: Callable[[int], object]) -> RuntimeError:
    """The error for a batch that ran out of memory.

    It names the largest of batch / 2, batch / 4, ... with which attempt(size) runs now.
    """
    size = batch // 2
    while size:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            size //= 2
        else:
            return RuntimeError(
                f"batches of {batch} images do not fit into the GPU's memory: set {parameter} to {size}, which fits"
            )
    return RuntimeError("not even one image fits into the GPU's memory beside what is there: free some of it, or set DEVICE to cpu")
