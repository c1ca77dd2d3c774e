"""What `make` calls and no notebook imports."""
