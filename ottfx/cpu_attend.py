"""Attention over affine storage on a CPU in C++: builds `kernels/cpu` when it is first needed, and calls it.

The C++ is compiled by what compiles Inductor's own C++ for CPUs, once for a machine: the library stays in Inductor's
cache folder. Where that cannot be done the plain-torch definition runs instead, and the log says so once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ottfx

log = logging.getLogger("ottfx")

MOST_ROWS = 128
"""Query rows of a kv head up to which one pass over the codes is faster than dequantizing them for a matrix product."""
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.bool: 4}
_NO_TYPE = -1


class _Arguments(ctypes.Structure):
    """The struct `Arguments` of `kernels/cpu/arguments.h`, in the same order."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "batch kv_heads group_heads q_len head_dim capacity key_groups value_groups key_bits value_bits "
                "window_rows window_type pool_rows pool_type page_seats mask_type"
            ).split()
        ),
        ("mask_strides", ctypes.c_int64 * 4),
        ("softmax_scale", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "lengths query key value key_codes value_codes key_scale key_zero_point value_scale value_zero_point "
                "key_order key_residual value_residual key_residual_scale value_residual_scale "
                "outlier_key outlier_value outlier_position seat_key seat_value seat_row seat_key_scale "
                "seat_value_scale mask result"
            ).split()
        ),
    ]


@functools.cache
def _library() -> Any | None:
    """Return the compiled `kernels/cpu`, or None if there is no compiler for it."""
    try:
        from torch._inductor.codecache import CppCodeCache

        folder = next(path for root in ottfx.__path__ if (path := Path(root, "kernels", "cpu")).is_dir())
        sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.*")))
        # The cache looks at this text only, so it has to name the contents of the file that it includes.
        text = f'// {hashlib.sha256(sources).hexdigest()}\n#include "{folder / "affine_attend.cpp"}"\n'
        library = CppCodeCache.load(text, extra_flags=_FLAGS)
        library.ottfx_affine_attend.restype = None
    except Exception as error:  # no compiler, one that fails, no folder to write to: all end in the definition
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("ottfx: CPU attention runs in plain torch, which is slow: its C++ was not built. %s", reason)
        return None
    return library


def takes(query: Tensor, key: Tensor, mask: Tensor | None, state: Mapping[str, Any]) -> bool:
    """Whether `attend` is there, and made for these operands: few query rows, state tensors in one piece.

    Args:
        query: [batch, num_heads, q_len, head_dim].
        key: new tokens [batch, num_kv_heads, q_len, head_dim].
        mask: as in `attend`.
        state: keyword operands of `attend`.
    """
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    in_one_piece = all(tensor.is_contiguous() for tensor in state.values() if isinstance(tensor, Tensor))
    known_mask = mask is None or mask.dtype in _TYPES
    return key.device.type == "cpu" and rows <= MOST_ROWS and in_one_piece and known_mask and _library() is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    site: int,
    softmax_scale: float,
    *,
    key_codes: Tensor,
    key_scale: Tensor,
    key_zero_point: Tensor,
    key_residual: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero_point: Tensor | None,
    value_residual: Tensor,
    outlier_key: Tensor | None = None,
    outlier_position: Tensor | None = None,
    outlier_value: Tensor | None = None,
    seat_key: Tensor | None = None,
    seat_key_scale: Tensor | None = None,
    seat_row: Tensor | None = None,
    seat_value: Tensor | None = None,
    seat_value_scale: Tensor | None = None,
    key_order: Tensor | None = None,
    key_residual_scale: Tensor | None = None,
    value_residual_scale: Tensor | None = None,
    key_bits: int,
    value_bits: int,
    result_dtype: torch.dtype | None = None,
) -> Tensor:
    """Do what `affine_read.attend` does, whose operands these are, where `takes` said that this can."""
    batch, kv_heads, q_len, head_dim = key.shape
    result = torch.empty(query.shape, dtype=torch.float32)
    # Kept until the call returns: the struct holds addresses only.
    rows = [tensor.float().contiguous() for tensor in (query, key, value)]
    strides = [0] * 4
    if mask is not None:
        strides = [stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape, strict=True)]
        strides[3] = mask.stride(3)
    arguments = _Arguments(
        batch=batch,
        kv_heads=kv_heads,
        group_heads=query.shape[1] // kv_heads,
        q_len=q_len,
        head_dim=head_dim,
        capacity=key_codes.shape[2],
        key_groups=key_scale.shape[3],
        value_groups=value_scale.shape[3],
        key_bits=key_bits,
        value_bits=value_bits,
        window_rows=key_residual.shape[2],
        window_type=_TYPES[key_residual.dtype],
        pool_rows=0 if outlier_key is None else outlier_key.shape[2],
        pool_type=_NO_TYPE if outlier_key is None else _TYPES[outlier_key.dtype],
        page_seats=0 if seat_row is None else seat_row.shape[3],
        mask_type=_NO_TYPE if mask is None else _TYPES[mask.dtype],
        mask_strides=(ctypes.c_int64 * 4)(*strides),
        softmax_scale=softmax_scale,
        lengths=lengths.data_ptr() + site * lengths.stride(0) * lengths.element_size(),
        query=rows[0].data_ptr(),
        key=rows[1].data_ptr(),
        value=rows[2].data_ptr(),
        key_codes=key_codes.data_ptr(),
        value_codes=value_codes.data_ptr(),
        key_scale=key_scale.data_ptr(),
        key_zero_point=key_zero_point.data_ptr(),
        value_scale=value_scale.data_ptr(),
        value_zero_point=_address(value_zero_point),
        key_order=_address(key_order),
        key_residual=key_residual.data_ptr(),
        value_residual=value_residual.data_ptr(),
        key_residual_scale=_address(key_residual_scale),
        value_residual_scale=_address(value_residual_scale),
        outlier_key=_address(outlier_key),
        outlier_value=_address(outlier_value),
        outlier_position=_address(outlier_position),
        seat_key=_address(seat_key),
        seat_value=_address(seat_value),
        seat_row=_address(seat_row),
        seat_key_scale=_address(seat_key_scale),
        seat_value_scale=_address(seat_value_scale),
        mask=_address(mask),
        result=result.data_ptr(),
    )
    library = _library()
    assert library is not None
    library.ottfx_affine_attend(ctypes.byref(arguments))
    return result.to(result_dtype or query.dtype)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
