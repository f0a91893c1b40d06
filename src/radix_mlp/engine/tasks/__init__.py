"""What an engine computes: embeddings, ranks, classes, scores."""
