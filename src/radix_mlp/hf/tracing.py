"""Calls that are recorded or transformed, not run: a plan made of their ids would be kept for all later ids."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["reason_of_tracing"]


def reason_of_tracing(input_ids: torch.Tensor) -> str | None:
    """Why a plan of these ids must not or cannot be made now, or None.

    Examples:
        >>> reason_of_tracing(torch.tensor([[5, 6]]))
        >>> reason_of_tracing(torch.zeros(1, 2, device="meta"))
        'input_ids hold no numbers (they are fake, distributed or on the meta device)'
    """
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None or get_proxy_mode() is not None:
        return "the call is traced (export, torch.jit.trace or make_fx)"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "the call runs inside a transformation of torch.func (grad, vmap, jvp)"
    if forward_ad._current_level >= 0:
        return "the call runs in forward mode of differentiation"
    given: Any = input_ids
    if given.is_meta or isinstance(given, FakeTensor) or is_traceable_wrapper_subclass(given):
        return "input_ids hold no numbers (they are fake, distributed or on the meta device)"
    return None
