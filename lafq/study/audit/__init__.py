"""The audit (07_audit, 12_noise): what each choice of the authors' released code moves, and what
their published images show.

It may import what `study` may, but no figures.
"""
