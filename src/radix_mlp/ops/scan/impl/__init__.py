"""The ways to run scans on the tree; `radix_mlp.ops.scan.registry` lists them."""
