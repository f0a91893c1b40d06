"""Images on the tree: a token of a picture is keyed by what it shows, and equal pictures are computed once."""
