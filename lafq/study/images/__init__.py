"""Candidates are quantized, sampled and scored: features, metrics, bootstrap intervals, kept
images, Dask and peak memory.

It may import `allocation` and what that may, and `diffusion`.
"""

import lafq.study.diffusion  # noqa: F401  (makes torchvision importable before a module here asks for it)
