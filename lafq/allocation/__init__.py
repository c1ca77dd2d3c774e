"""Which weights are stored in which format: threshold rules, Pareto fronts and the solver for a
budget of bytes.

It may import `fisher`, `quantization` and the root files.
"""
