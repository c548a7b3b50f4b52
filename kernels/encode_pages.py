"""Launcher of the kernels of `ottfx/kernels/affine_encode.py`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ottfx.kernels.affine_encode import (
    KEY_CHANNELS,
    KEY_WARPS,
    _encode_key_pages_kernel,
    _encode_value_pages_kernel,
    value_warps,
)
from ottfx.kernels.launch import launch


def encode_pages(
    common: dict[str, Any], score: Tensor, key_codes: Tensor, key_scale: Tensor, key_zero_point: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero_point: Tensor, *,
    bits: tuple[int, int], windows: tuple[int, int], steps: tuple[int, int], norm: int, traces: bool, seated: bool,
    codes: dict[str, Any],
) -> None:  # fmt: skip
    """Encode the whole pages among the due tokens.

    Args:
        common: arguments that the kernels of the append share.
        score: fp32 [batch, num_kv_heads, due tokens]: written, if outliers are traced.
        key_codes: state, as the five that follow; mutated.
        key_scale: state.
        key_zero_point: state.
        value_codes: state.
        value_scale: state.
        value_zero_point: state, or anything where `codes` say that grids are around 0.
        bits: widths of key and value codes.
        windows: newest tokens that stay out of pages, of keys and of values.
        steps: tokens that are packed together, of keys and of values.
        norm: the norm of a key that is its score.
        traces: whether outliers are traced.
        seated: whether the flags of the due tokens say who has a seat of its group.
        codes: arguments that say what codes are.
    """
    shared = {
        name: common[name]
        for name in (
            "valid_ptr",
            "lengths_ptr",
            "hard_ptr",
            "replaced_ptr",
            "flags_per_head",
            "site",
            "q_len",
            "most_pages",
            "NUM_KV_HEADS",
            "HEAD_DIM",
            "HAS_VALID",
        )
    } | {"pages": key_codes.shape[2], "SEATED": seated}
    grid = (common["pairs"] * common["most_pages"],)
    keys = shared | {name: common[name] for name in common if name.startswith("stride_key")}
    keys |= {
        "key_ptr": common["key_ptr"],
        "order_ptr": codes["key_order_ptr"],
        "codes_ptr": key_codes,
        "scale_ptr": key_scale,
        "zero_point_ptr": key_zero_point,
        "score_ptr": score,
        "BITS": bits[0],
        "MIXED": codes["MIXED"],
        "SEARCH": codes["SEARCH"],
        "GROUP": common["GROUP"],
        "WINDOW": windows[0],
        "STEP": steps[0],
        "NORM": norm if traces else 1,
        "HAS_OUTLIERS": traces,
        "CHUNK": min(common["HEAD_DIM"], KEY_CHANNELS),
    }
    launch(_encode_key_pages_kernel, grid, keys, num_warps=KEY_WARPS, num_stages=1)
    values = shared | {name: common[name] for name in common if name.startswith("stride_value")}
    values |= {
        "value_ptr": common["value_ptr"],
        "codes_ptr": value_codes,
        "scale_ptr": value_scale,
        "zero_point_ptr": value_zero_point,
        "BITS": bits[1],
        "SYMMETRIC": codes["SYMMETRIC"],
        "SEARCH": codes["SEARCH"],
        "VALUE_GROUPS": value_scale.shape[3],
        "WINDOW": windows[1],
        "STEP": steps[1],
    }
    launch(_encode_value_pages_kernel, grid, values, num_warps=value_warps(common["HEAD_DIM"]), num_stages=1)
