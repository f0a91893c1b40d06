"""Convolutions and recurrences on the tree: operations with a state along each root path, several ways to run them."""
