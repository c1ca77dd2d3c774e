"""Number formats, rounding, and models whose weights are quantized: in memory and as files."""
