"""Number formats, scales, bit packing, and models whose weights are quantized: in memory and as
files.

It may import the root files of lafq alone, and knows nothing of Fisher information, MNIST or
tables.
"""
