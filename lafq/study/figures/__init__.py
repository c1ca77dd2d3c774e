"""What a reader sees: tables, figures and the explorer.

It may import all of lafq.
"""
