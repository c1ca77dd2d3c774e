"""Fisher information of the weights of any network: empirical (per sample) and Monte Carlo (true),
with its curvature.

It may import `quantization` and the root files.
"""
