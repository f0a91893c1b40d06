"""A decoder's layers with their projections joined and what stands between them in three kernels."""

from radix_mlp.hf.fused.decoder import FusedDecoder

__all__ = ["FusedDecoder"]
