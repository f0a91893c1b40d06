"""One batch: prepared, launched and collected."""
