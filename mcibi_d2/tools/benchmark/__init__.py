"""Time the parts that the project promises to be fast."""
