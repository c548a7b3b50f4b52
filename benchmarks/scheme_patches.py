"""Parts of `ott+` in plain torch, replaced inside a context: what `benchmarks.quality_ideas` measures.

Production code knows nothing of them. Schedule and window stay those of the real cache, and so does what attention
reads, except in `factors_of_keys`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ottfx import affine_cache, affine_read, grid_search
from ottfx.affine_schedule import Due
from ottfx.group_seats import Seats, seat_positions
from ottfx.rotation import rotate
from ottfx.schemes import ott_plus
from ottfx.schemes.base import ROLES
from ottfx.window_rows import decode_rows, encode_rows

LONGEST = 4096
"""Tokens for which `factors_of_keys` has room."""
Rounding = Callable[[Tensor], Tensor]


@contextmanager
def seats_at_the_beginning(count: int, of_first_tokens: bool) -> Iterator[None]:
    """Leave the last `count` seats of each group free, but in the first group of a text.

    There the first `count` tokens have them, other than those with a seat already, or else the next in order of norm.
    """
    find_due, choose = affine_cache.due_range, affine_cache.choose_seats
    latest: list[Due] = []

    def due_range(*args: Any) -> Due:
        latest[:] = [find_due(*args)]
        return latest[0]

    def choose_seats(key: Tensor, real: Tensor, group_size: int, seats: int, score_norm: int) -> Seats:
        _, offset, taken = choose(key, real, group_size, seats, score_norm)
        if of_first_tokens:
            first = torch.arange(count).expand(*offset.shape[:3], -1)
            has_seat = (first.unsqueeze(-1) == offset[..., None, :-count]).any(-1)
            is_real = real.unflatten(1, (-1, group_size))[:, None, :, :count]
            offset = torch.cat([offset[..., :-count], first], dim=-1)
            taken = torch.cat([taken[..., :-count], is_real & ~has_seat], dim=-1)
        is_first_group = (latest[0].start + group_size * torch.arange(offset.shape[2])).unsqueeze(-1) == 0
        taken = taken & (is_first_group | (torch.arange(seats) < seats - count))
        holders = torch.zeros(*offset.shape[:3], group_size, dtype=torch.uint8)
        return Seats(holders.scatter_add(-1, offset, taken.byte()).bool().flatten(2, 3), offset, taken)

    with (
        patch.object(affine_cache, "due_range", due_range),
        patch.object(affine_cache, "choose_seats", choose_seats),
    ):
        yield


def rounding_to(dtype: torch.dtype, factor: float = 1.0) -> Rounding:
    """Return what rounds fp32 to `dtype`, in which numbers are stored divided by `factor`."""
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float16).max / factor)

    def rounded(x: Tensor) -> Tensor:
        return (x / factor).clamp(-most, most).to(dtype).float() * factor

    return rounded


E4M3_SCALE = rounding_to(torch.float8_e4m3fn, 2.0**-4)
"""Scales from 2**-13 to 28: as they are, small ones would be subnormal."""
E4M3 = rounding_to(torch.float8_e4m3fn)
BF16 = rounding_to(torch.bfloat16)


@contextmanager
def narrow_constants(
    scale: Rounding,
    key_zero_point: Rounding = grid_search.round_to_half,
    value_zero_point: Rounding = grid_search.round_to_half,
) -> Iterator[None]:
    """Round scales and zero points in another way, before the errors of the candidates are compared."""
    code_keys, code_values = affine_cache.code_keys, affine_cache.code_values

    def rounded_keys(*args: Any) -> Any:
        with _rounding_in_turn(key_zero_point, scale):
            return code_keys(*args)

    def rounded_values(rows: Tensor, bits: int, symmetric: bool, range_search: bool) -> Any:
        with _rounding_in_turn(scale) if symmetric else _rounding_in_turn(value_zero_point, scale):
            return code_values(rows, bits, symmetric, range_search)

    with (
        patch.object(affine_cache, "code_keys", rounded_keys),
        patch.object(affine_cache, "code_values", rounded_values),
    ):
        yield


@contextmanager
def _rounding_in_turn(*roundings: Rounding) -> Iterator[None]:
    # Each candidate of a grid with zero points rounds its zero point, then its scale.
    turns = itertools.cycle(roundings)
    with patch.object(grid_search, "round_to_half", lambda x: next(turns)(x)):
        yield


def token_norms(group: Tensor) -> Tensor:
    """Return the root mean square of each token's key: `group` [..., tokens, head_dim] -> [..., tokens, 1]."""
    return group.square().mean(-1, keepdim=True).sqrt()


def dual_scales(group: Tensor, rounds: int = 8) -> Tensor:
    """Return the factors of tokens that balance a group together with factors of channels, as KVarN finds them.

    Channels and tokens are divided by their standard deviations in turn, and the best balanced state is kept. The
    factors of channels are not returned: each channel of a group has a grid of its own, which absorbs them.

    Source: arXiv:2606.03458, without its rotation; logarithms are clamped to -0.3 .. 10 as there.
    """
    by_token, by_channel = (torch.zeros_like(group.narrow(dim, 0, 1)) for dim in (-1, -2))
    best, least = by_token, None
    for _ in range(rounds):
        by_channel = _balanced(by_channel, group, by_token + by_channel, -2)
        by_token = _balanced(by_token, group, by_token + by_channel, -1)
        rest = group * (-by_token - by_channel).exp()
        spreads = [rest.std(dim).clamp(min=1e-6) for dim in (-1, -2)]
        imbalance = sum(spread.amax(-1) / spread.amin(-1) for spread in spreads)[..., None, None]
        best = by_token if least is None else torch.where(imbalance < least, by_token, best)
        least = imbalance if least is None else torch.minimum(imbalance, least)
    return best.exp()


def _balanced(logarithm: Tensor, group: Tensor, of_all: Tensor, dim: int) -> Tensor:
    spread = (group * (-of_all).exp()).std(dim, keepdim=True)
    return (logarithm + spread.clamp(min=1e-6).log()).clamp(-0.3, 10)


@contextmanager
def factors_of_keys(factors: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Divide each key by a factor of its own, in fp16, before the grids of the channels; multiply where it is read.

    For one sequence, with the window in 8 bits and symmetric values. Attention gets the tokens that such a cache gives
    back, as rows of a window that nothing leaves; they change when a group is packed, as in the cache.
    """
    code, append, attend = affine_cache.code_keys, ott_plus.affine_append, ott_plus.affine_attend
    latest: list[Tensor] = []
    factor_of: dict[int, Tensor] = {}
    given_back: dict[int, dict[str, Tensor]] = {}

    def code_keys(group: Tensor, bits: int, in_range: Tensor, *args: Any) -> Any:
        # Nobody reads the codes of tokens with a seat: as the mean of the others they do not disturb factors.
        mean = torch.where(in_range, group, 0.0).sum(3, keepdim=True) / in_range.sum(3, keepdim=True).clamp(min=1)
        group = torch.where(in_range, group, mean)
        divisor = factors(group).half().float()
        divisor = torch.where(divisor > 0, divisor, 1.0)
        latest.append(divisor.flatten(2, 3))
        return code(group / divisor, bits, in_range, *args)

    def affine_append(key: Tensor, value: Tensor, mask: Any, lengths: Tensor, site: int, **state: Any) -> None:
        past, packed = lengths[site, :2].tolist()
        latest.clear()
        append(key, value, mask, lengths, site, **state)
        length, step = past + key.shape[2], state["key_step"]
        if past == 0:
            room = (*key.shape[:2], LONGEST)
            factor_of[site] = key.new_ones(*room, 1)
            given_back[site] = {f"{role}_residual": key.new_zeros(*room, key.shape[3]) for role in ROLES}
        rows = given_back[site]
        if not latest:
            stored = rotate(value) if state["rotate_values"] else value
            for role, new in zip(ROLES, (key, stored), strict=True):
                rows[f"{role}_residual"][:, :, past:length] = decode_rows(*encode_rows(new))
            return
        after = max(packed, (length - state["key_window"]) // step * step)
        factor, position = factor_of[site], seat_positions(state["seat_row"])
        factor[:, :, packed:after] = latest[0][:, :, : after - packed]
        seated = (position >= 0) & (position < after)
        is_seated = torch.zeros_like(factor[..., 0]).scatter_add(-1, position.clamp(min=0), seated.float()) > 0
        factor[is_seated] = 1.0
        state["value_zero_point"] = state["value_scale"].narrow(3, 0, 0)
        for role in ROLES:
            rows[f"{role}_residual"][:, :, :length] = affine_read.read_tokens(
                role, state, state[f"{role}_bits"], after, 0, length
            )
        rows["key_residual"][:, :, :length] *= factor[:, :, :length]

    def affine_attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Any, lengths: Tensor, site: int, *sizes: Any, **state: Any
    ) -> Tensor:
        without = ("key_order", "key_residual_scale", "value_residual_scale")
        state |= {**dict.fromkeys(without), **given_back[site]}
        nothing_packed = torch.tensor([[int(lengths[site, 0]), 0, 0]])
        return attend(query, key, value, mask, nothing_packed, 0, *sizes, **state)

    with (
        patch.object(affine_cache, "code_keys", code_keys),
        patch.object(ott_plus, "affine_append", affine_append),
        patch.object(ott_plus, "affine_attend", affine_attend),
    ):
        yield
