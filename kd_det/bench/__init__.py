"""A run built from its config, to be examined; every function leaves the model as it was."""
