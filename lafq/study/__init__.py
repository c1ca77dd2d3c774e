"""The poster's experiment: its model and data, images, rows, claims, the released code, and
figures.

It may import the method (`quantization`, `fisher`, `allocation`); the method never imports it.
"""
