"""A name to a model: loading, kinds, poolers, heads."""
