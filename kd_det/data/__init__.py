"""Data sets: look-up by name, checks before training, and the digits, which need no download."""
