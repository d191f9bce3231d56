"""``make quickstart``: a small detector learns from a large one, on real images, in minutes."""
