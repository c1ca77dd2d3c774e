"""The study of budgets (06_budget): methods at equal bytes, predicted and measured damage, and the targets set for them.

It may import what `paper` may.
"""
