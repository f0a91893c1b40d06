"""CUDA graphs of a forward on compact rows: of fused layers, and of the model's own modules."""

from radix_mlp.hf.graphs.graphed_decoder import GraphedDecoder
from radix_mlp.hf.graphs.modules_decoder import ModulesDecoder, why_not_graphed

__all__ = ["GraphedDecoder", "ModulesDecoder", "why_not_graphed"]
