"""MHGD: relations that attention heads learned from the teacher, with what trains them."""
