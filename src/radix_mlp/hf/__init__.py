"""Hugging Face models on folded batches: `enable`, `disable`, `forward_compact`, and what is supported."""

from radix_mlp.hf.enable import disable, enable, is_enabled, last_call
from radix_mlp.hf.forward import forward_compact
from radix_mlp.hf.support import why_unsupported

__all__ = ["disable", "enable", "forward_compact", "is_enabled", "last_call", "why_unsupported"]
