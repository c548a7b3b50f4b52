"""What compilers trace over a KVTensor's anchor: ops that look the content up when the graph runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ottfx.cache_state import Payload
from ottfx.errors import CacheError
from ottfx.kv_tensor import KVTensor, append, crop


def _payload_of(anchor: Tensor, op: str) -> Payload:
    payload = getattr(anchor, "ottfx_payload", None)
    if payload is None:
        raise CacheError(
            f"ottfx.{op}: the quantized cache behind this tensor is gone: a compiled graph kept its shape but not its "
            "content. Compile the model with ottfx.compile or backend='ott', or pass `tensor.dequantize()` to the "
            "other compiler."
        )
    return payload


@torch.library.custom_op("ottfx::handle_dequantize", mutates_args=())
def handle_dequantize(anchor: Tensor, length: int) -> Tensor:
    """Dense `[batch, num_kv_heads, length, head_dim]` of the cache behind `anchor`."""
    payload = _payload_of(anchor, "handle_dequantize")
    if payload.total_length != length:
        raise CacheError(
            f"ottfx.handle_dequantize: the graph expects {length} tokens, the cache behind the tensor holds "
            f"{payload.total_length}. Another compiler lost an append; use backend='ott'."
        )
    return payload.dequantize()


@handle_dequantize.register_fake
def _(anchor: Tensor, length: int) -> Tensor:
    return anchor.new_empty((anchor.shape[0], anchor.shape[1], length, anchor.shape[3]))


@torch.library.custom_op("ottfx::handle_append", mutates_args=())
def handle_append(anchor: Tensor, new: Tensor) -> Tensor:
    """Anchor of the cache behind `anchor` with `new` `[batch, num_kv_heads, n, head_dim]` behind it, not yet packed."""
    return append(_payload_of(anchor, "handle_append"), new).anchor


@handle_append.register_fake
def _(anchor: Tensor, new: Tensor) -> Tensor:
    return torch.empty_like(anchor)


@torch.library.custom_op("ottfx::handle_crop", mutates_args=())
def handle_crop(anchor: Tensor, length: int) -> Tensor:
    """Anchor of the first `length` tokens of the cache behind `anchor`."""
    return KVTensor.from_payload(crop(_payload_of(anchor, "handle_crop"), length)).anchor


@handle_crop.register_fake
def _(anchor: Tensor, length: int) -> Tensor:
    return torch.empty_like(anchor)
