"""The tree's mask, compiled by FlashAttention-4 into its kernels. Imports the package: import this only in `fa4.py`.

The function must be in a file without postponed annotations, since the compiler reads its source.
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
