"""The page at `/playground`: type texts, see the answer and the prefix tree of that very batch."""
