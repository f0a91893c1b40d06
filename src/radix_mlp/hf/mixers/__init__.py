"""Mixers with a state or a convolution on compact rows: their own code, with kernel functions that follow the tree."""
