"""Model types, tiny models of each, and the sweeps that prove them; not part of the wheel."""
