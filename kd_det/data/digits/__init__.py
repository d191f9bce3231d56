"""Handwritten digits: images of one digit, and a detection data set drawn from them."""
