"""docs/storage.md once more, token by token in plain Python, for one (sequence, head)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Oracle:
    """OTT for one head over a whole sequence; tensors [length, head_dim] in fp32."""

    key: Tensor
    value: Tensor
    valid: list[bool]
    bits: int
    group_size: int
    value_group_size: int
    residual_length: int
    capacity: int
    spill_capacity: int
    norm: int = 1
    replacement: str = "rest"
    pool: list[int] = field(default_factory=list)
    spill: list[int] = field(default_factory=list)
    ever_marked: set[int] = field(default_factory=set)
    spill_count: int = 0

    def run(self) -> Oracle:
        self.finite_key, self.finite_value = finite(self.key), finite(self.value)
        self.coded_key, self.coded_value = torch.zeros_like(self.key), torch.zeros_like(self.value)
        self.packed = max(0, (len(self.valid) - self.residual_length) // self.group_size * self.group_size)
        for start in range(0, self.packed, self.group_size):
            members = range(start, start + self.group_size)
            self._quantize(members, self._trace(members))
        return self

    def _score(self, token: int) -> float:
        return self.finite_key[token].norm(self.norm).item()

    def _trace(self, members: range) -> set[int]:
        limit = max(self.spill_capacity, 1)
        if self.capacity == 0 or self.spill_count >= limit:
            return set()
        rivals = self.pool + [token for token in members if self.valid[token]]
        seated = sorted(rivals, key=self._score)[: self.capacity]
        displaced = [token for token in self.pool if token not in seated]
        if self.spill_count + len(displaced) > self.spill_capacity:
            self.spill_count = limit
            return set()
        self.spill += displaced
        self.spill_count += len(displaced)
        self.pool = seated
        winners = {token for token in seated if token in members}
        self.ever_marked |= winners
        return winners

    def _quantize(self, members: range, winners: set[int]) -> None:
        real = [token for token in members if self.valid[token]]
        rest = [token for token in real if token not in winners]
        of_mean = rest if self.replacement == "rest" else real
        means = [
            rows[of_mean].mean(0) if of_mean else torch.zeros(rows.shape[1])
            for rows in (self.finite_key, self.finite_value)
        ]
        keys = torch.stack([self.finite_key[t] if t in rest else means[0] for t in members])
        in_range = [t in rest if self.replacement == "rest" else t in real for t in members]
        for channel in range(keys.shape[1]):
            coded = quantize(keys[:, channel], self.bits, torch.tensor(in_range))
            self.coded_key[members.start : members.stop, channel] = coded
        for token in members:
            row = self.finite_value[token] if token in rest else means[1]
            for first in range(0, row.shape[0], self.value_group_size):
                part = slice(first, first + self.value_group_size)
                take = torch.full((self.value_group_size,), self.valid[token])
                self.coded_value[token, part] = quantize(row[part], self.bits, take)


def finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.float(), nan=0.0, posinf=65504.0, neginf=-65504.0).clamp(-65504.0, 65504.0)


def quantize(x: Tensor, bits: int, taking_part: Tensor) -> Tensor:
    """Quantize one group [members] and return what reading it gives."""
    if not taking_part.any():
        return torch.zeros_like(x)
    low, high = x[taking_part].min(), x[taking_part].max()
    zero_point = low.half().float()
    scale = ((high - zero_point) / (2**bits - 1)).clamp(0, 65504).half().float()
    if scale == 0:
        return zero_point.expand_as(x)
    return torch.round((x - zero_point) * (1 / scale)).clamp(0, 2**bits - 1) * scale + zero_point
