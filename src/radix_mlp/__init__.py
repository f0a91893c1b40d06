"""Transformers that compute every shared token once."""

__version__ = "0.1.0"
