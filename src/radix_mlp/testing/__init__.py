"""Helpers for tests of code that uses radix-mlp."""
