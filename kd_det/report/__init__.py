"""One page about finished runs: the gain of the distillation, and its cost."""
