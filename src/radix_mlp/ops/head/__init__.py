"""Log-probabilities at the edges of the tree, without logits of all tokens."""
