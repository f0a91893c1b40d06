"""The tree's mask as FlashAttention-4 compiles it into its kernels. Imports the package: not to be imported elsewhere.

The function has to stand in a file, since the compiler reads its source, without postponed annotations.
"""

# device code
# mypy: disable-error-code="no-untyped-def"

import cutlass.cute as cute
from flash_attn.cute import utils

__all__ = ["tree_mask"]


@cute.jit
def tree_mask(batch, head, query, key, seqlen_info, aux_tensors):
    """`key <= query < end[key]`; `aux_tensors` is `[end]`, padded to whole blocks."""
    end = utils.scalar_to_ssa(aux_tensors[0][key[0]], cute.Int32)
    return (key <= query) & (query < end)
