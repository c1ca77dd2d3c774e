"""What `make` calls and no notebook imports: running and publishing notebooks, pages with numbers,
long experiments, checks.
"""
