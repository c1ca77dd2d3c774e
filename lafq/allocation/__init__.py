"""Which weights are stored in which format: threshold rules, and plans within a budget of bytes."""
