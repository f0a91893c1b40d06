"""Model types, tiny models of each, and the sweeps that prove them; no part of the wheel."""
