"""The HTTP server: text-embeddings-inference's routes, OpenAI's, and those of rerank and scoring clients."""
