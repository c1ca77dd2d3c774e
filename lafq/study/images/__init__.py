"""Rows are quantized, sampled and scored: features, metrics with bootstrap intervals, kept images,
Dask.
"""

import lafq.study.diffusion  # noqa: F401  (makes torchvision importable before a module here asks for it)
