"""One run: its config, its plan, its folder and its record."""
