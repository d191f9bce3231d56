"""IRG: instance relationship graphs, and the multi-type knowledge of its full objective."""
