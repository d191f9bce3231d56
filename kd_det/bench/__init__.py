"""A run built from its config, to be looked at: every look leaves the model as it was."""
