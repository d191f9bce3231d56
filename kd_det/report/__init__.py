"""One page about finished runs: what the distillation bought, and what it cost."""
