"""The study of the paper: its published values, its threshold rules as rows, its claims, and the released code's choices.

It may import `evaluation` and what that may.
"""
