"""The routes: each reads a body, asks the service, and writes the answer."""
