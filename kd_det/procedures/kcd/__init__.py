"""KCD: a training set that shrinks to the points the student still learns from."""
