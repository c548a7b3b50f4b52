"""Outlier tracing of OTT in plain torch: which tokens of the due groups get a seat, and what the pool holds after.

The sequential rule stands in `docs/storage.md`. Here all groups of a call are decided at once, because a traced
program has no loop over a symbolic number of groups:

* Only the `capacity` lowest of a group can get a seat, so the candidates are the pool and those, in arrival order.
* A candidate loses its seat (or never gets one) at the group in which the number of better candidates that have
  arrived reaches `capacity`. One cumulative sum over a pairwise comparison gives that group for every candidate.
* Displaced tokens of a group follow from it, and a running sum of them says where tracing stops. Groups that take
  effect are a prefix, so later groups, although counted, never influence earlier ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ottfx.reference import make_finite


class OutlierUpdate(NamedTuple):
    """What tracing decided: the new contents of the pool, and the slots that moved into it."""

    is_outlier: Tensor
    """bool [batch, heads, tokens]: tokens of the window that got a seat when their group was packed."""
    key: Tensor
    """[batch, heads, rows, head_dim]."""
    value: Tensor
    position: Tensor
    """int32 [batch, heads, rows], -1 = empty."""
    spill_count: Tensor
    """int32 [batch, heads]."""


def token_scores(key: Tensor, norm: int) -> Tensor:
    """Return the L1 (`norm` 1) or L2 (`norm` 2) norm over the last axis of the finite fp32 keys."""
    key = make_finite(key)
    return key.abs().sum(-1) if norm == 1 else (key * key).sum(-1).sqrt()


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(2, index.unsqueeze(-1).expand(*index.shape, rows.shape[-1]))


def trace_outliers(
    key: Tensor,
    value: Tensor,
    competing: Tensor,
    due: Tensor,
    first_position: Tensor,
    outlier_key: Tensor,
    outlier_value: Tensor,
    outlier_position: Tensor,
    spill_count: Tensor,
    *,
    capacity: int,
    group_size: int,
    score_norm: int,
) -> OutlierUpdate:
    """Let the tokens of the due groups compete with the pool for its seats, group by group.

    Args:
        key: [batch, heads, groups * group_size, head_dim], the tokens of consecutive groups; `value` alike.
        value: see `key`.
        competing: bool [batch, tokens]: real tokens. Others get no seat.
        due: bool [groups]: groups that are packed in this call. Others change nothing.
        first_position: int64 scalar, position of the first token.
        outlier_key: [batch, heads, rows, head_dim]: `capacity` seats, then the spill pool; `outlier_value` alike.
        outlier_value: see `outlier_key`.
        outlier_position: int32 [batch, heads, rows].
        spill_count: int32 [batch, heads].
        capacity: seats of the pool, at least 1 and at most `group_size`.
        group_size: tokens of a group.
        score_norm: 1 or 2.

    Source: arXiv:2505.10938, section 4 (outlier tokens tracing); ties and the stop rule as in docs/storage.md.
    """
    batch, heads, tokens, _ = key.shape
    groups = due.shape[0]
    rows = outlier_position.shape[-1]
    spill_capacity = rows - capacity
    device = key.device
    pool_position = outlier_position[..., :capacity]

    known_keys = torch.cat([outlier_key[:, :, :capacity], key], dim=2)
    scores = token_scores(known_keys, score_norm)
    competing = (competing.reshape(-1, groups, group_size) & due.unsqueeze(-1)).unsqueeze(1)
    group_scores = scores[..., capacity:].reshape(batch, heads, groups, group_size)
    ranked, member = torch.where(competing, group_scores, torch.inf).sort(dim=-1, stable=True)
    member = member[..., :capacity] + group_size * torch.arange(groups, device=device).unsqueeze(-1)

    # [batch, heads, candidates], in arrival order; `row` indexes the pool seats followed by the window.
    count = capacity + groups * capacity
    seat = torch.arange(capacity, device=device).expand(batch, heads, capacity)
    row = torch.cat([seat, capacity + member.reshape(batch, heads, groups * capacity)], dim=-1)
    pool_score = torch.where(pool_position >= 0, scores[..., :capacity], torch.inf)
    score = torch.cat([pool_score, ranked[..., :capacity].reshape(batch, heads, groups * capacity)], dim=-1)
    exists = score < torch.inf
    arrival = torch.arange(count, device=device)
    group = arrival // capacity - 1

    # better[..., c, d]: candidate d goes before candidate c.
    mine, other = score.unsqueeze(-1), score.unsqueeze(-2)
    better = (other < mine) | ((other == mine) & (arrival < arrival.unsqueeze(-1)))
    better = better & exists.unsqueeze(-2)
    lost_at = (better.cumsum(-1) < capacity).sum(-1)
    lost_group = lost_at // capacity - 1
    won = exists & (lost_group > group)

    displaced = torch.zeros(batch, heads, groups + 1, dtype=torch.int64, device=device)
    displaced = displaced.scatter_add(-1, lost_group.clamp(min=0), won.long())[..., :groups]
    spilled_before = spill_count.long().unsqueeze(-1)
    spilled_after = spilled_before + displaced.cumsum(-1)
    stop = max(spill_capacity, 1)
    effective = due & (spilled_after - displaced < stop) & (spilled_after <= spill_capacity)
    stopped = (due & ~effective).any(-1)
    added = torch.where(effective, displaced, 0).sum(-1)
    new_count = torch.where(stopped, stop, spill_count.long() + added).to(spill_count.dtype)

    # The pool's own seats count as group -1, which always took effect; group `groups` never comes.
    edge = torch.ones(batch, heads, 1, dtype=torch.bool, device=device)
    took_effect = torch.cat([edge, effective, ~edge], dim=-1)
    seated = won & took_effect.index_select(-1, group + 1)
    spilled = seated & took_effect.gather(-1, lost_group + 1)
    pooled = seated & ~spilled

    new_seat = (better & pooled.unsqueeze(-2)).sum(-1)
    lost_mine, lost_other = lost_group.unsqueeze(-1), lost_group.unsqueeze(-2)
    sooner = (lost_other < lost_mine) | ((lost_other == lost_mine) & better)
    new_spill = capacity + spilled_before + (sooner & spilled.unsqueeze(-2)).sum(-1)
    target = torch.where(pooled, new_seat, torch.where(spilled, new_spill, rows))
    # Row `rows` takes what has no place.
    source = torch.full((batch, heads, rows + 1), -1, dtype=torch.int64, device=device)
    source = source.scatter(-1, target, row)[..., :rows]
    moved = source >= 0
    source = source.clamp(min=0)

    known_values = torch.cat([outlier_value[:, :, :capacity], value], dim=2)
    window_position = (first_position + torch.arange(tokens, device=device)).to(outlier_position.dtype)
    positions = torch.cat([pool_position, window_position.expand(batch, heads, tokens)], dim=-1)

    is_outlier = torch.zeros(batch, heads, tokens + 1, dtype=torch.bool, device=device)
    target = torch.where(seated & (group >= 0), row - capacity, tokens)
    is_outlier = is_outlier.scatter(-1, target, torch.ones_like(seated))[..., :tokens]
    return OutlierUpdate(
        is_outlier=is_outlier,
        key=torch.where(moved.unsqueeze(-1), _take_rows(known_keys, source), outlier_key),
        value=torch.where(moved.unsqueeze(-1), _take_rows(known_values, source), outlier_value),
        position=torch.where(moved, positions.gather(-1, source), outlier_position),
        spill_count=new_count,
    )
