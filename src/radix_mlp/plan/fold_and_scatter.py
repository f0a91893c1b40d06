"""`compute_fold_and_scatter`: upstream's interface."""

__all__ = ["compute_fold_and_scatter"]


def compute_fold_and_scatter() -> None:
    """Interim."""
    raise NotImplementedError
