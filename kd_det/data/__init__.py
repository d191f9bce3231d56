"""Data that is always there, and the checks every data set passes before training."""
