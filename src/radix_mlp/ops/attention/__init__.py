"""Attention on the tree: one operation, several ways to run it."""
