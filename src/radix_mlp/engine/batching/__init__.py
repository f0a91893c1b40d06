"""Which sequences share a batch, and in which order."""
