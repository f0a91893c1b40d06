"""What folding saves on a set of texts, before any model runs: the tree, its picture, the predicted speed-up."""
