"""Methods that choose or change batches, or train something before the run begins."""
