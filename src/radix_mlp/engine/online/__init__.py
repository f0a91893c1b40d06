"""Requests that arrive while others run."""
