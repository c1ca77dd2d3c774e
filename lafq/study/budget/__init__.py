"""The study of budgets (06_budget and 09 to 11): methods at equal bytes, predicted and measured
damage, and sentences on both.

It may import what `study` may, but no figures.
"""
