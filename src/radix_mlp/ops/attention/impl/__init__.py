"""The ways to run tree attention, one module each; `radix_mlp.ops.attention.registry` lists them."""
