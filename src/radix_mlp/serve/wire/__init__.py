"""The bodies that clients send, as they send them; unknown fields are refused."""
