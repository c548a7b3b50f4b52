"""What a quantization scheme is: a frozen config, the state it stores, one append op and one attend op.

A scheme never sees FX, and a pass never names a scheme. The contract between the two is `Scheme`:
the pass asks for state tensors by name and puts `append_op` and `attend_op` where an attention was.

State is paged: `PAGE` tokens of one (sequence, kv head) are one page, and capacity is counted in pages.
Slot and absolute token position are the same number: token t lives in page t // PAGE, row t % PAGE.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

PAGE = 128
"""Tokens of one page of storage."""

ANY_LENGTH = -1
"""Stands for `past_length` in a graph that one set of arguments serves for all lengths."""

Role = Literal["key", "value"]
ROLES: tuple[Role, Role] = ("key", "value")
Part = Literal["codes", "scales", "residual", "pool", "tables", "dense"]


def is_always(size: Any, number: int) -> bool:
    """Whether a size is this number in every call of a graph. Adds no guard."""
    return isinstance(size, int) and size == number


def new_positions(lengths: Tensor, site: int, q_len: int) -> Tensor:
    """Return int64 [q_len]: the positions of the new tokens, which follow `lengths[site, 0]` stored ones."""
    first = lengths[site, :1]
    return first if is_always(q_len, 1) else first + torch.arange(q_len, device=lengths.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """Sizes of one half (keys or values) of one layer's cache. `batch_size` and `pages` may be symbolic."""

    batch_size: int
    num_kv_heads: int
    head_dim: int
    pages: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One state tensor: how to allocate it, how it grows, and what it counts as in a memory report.

    The batch axis is always 0, the kv head axis, where there is one, is 1.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Part
    fill: int | float = 0
    paged_dim: int | None = None
    """The axis that grows with capacity (its size is a multiple of `pages`), or None for a fixed size."""


@dataclass(frozen=True, kw_only=True)
class SchemeConfig:
    """Base of every scheme's options. Frozen and hashable: it is part of the compile key of a cache."""

    scheme: ClassVar[str]

    def at_layer(self, layer_index: int) -> SchemeConfig:
        """Return the config of one layer, with everything that varies by layer resolved.

        The result's `at_layer` returns itself for any index.
        """
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SchemeConfig:
        """Return itself: it never changes, and comparing it with itself is fast."""
        return self

    def describe(self) -> str:
        """One line for reports, such as `ott 2-bit, group 128, residual 32`."""
        fields = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.scheme}({fields})"


Config = TypeVar("Config", bound=SchemeConfig)


class Scheme(ABC, Generic[Config]):
    """A published method. Stateless: everything it needs comes as arguments.

    `append_op(key, value, mask, lengths, site, *key_state, *value_state, *constants) -> None`
        Stores the `q_len` new tokens `key`, `value` `[batch, num_kv_heads, q_len, head_dim]` at positions
        `past_length ..`, and packs what became due. Mutates the state tensors, and nothing else.
    `attend_op(query, key, value, mask, lengths, site, past_length, softmax_scale, *key_state, *value_state,
               *constants) -> Tensor`
        Attention of `query` `[batch, num_heads, q_len, head_dim]` over the stored past and the new tokens
        `key`, `value`, with the state as it was *before* they were appended. Returns the query's shape and dtype.

    `mask`: None (every query sees every token) or the mask of `scaled_dot_product_attention`, 4-D,
        `[batch or 1, num_heads or 1, q_len or 1, past_length + q_len]`, bool (True = attend) or additive float.
        It may have more columns, up to the capacity `pages * PAGE`; what they hold means nothing.
        Its last query row says which of the new tokens are real: a token that the last query may not see is
        padding, and padding takes no part in ranges, pools or means.
        Append ops of affine schemes may get bool `[batch, q_len]` instead: which of the new tokens are real.
    `lengths`: int64 `[num_sites, 3]` on the cache's device; row `site` is (past_length, key_packed, value_packed):
        tokens stored, and how many of them are codes, before this call. Kernels read lengths only from here.
    `past_length`: the same number as a (symbolic) int, for the CPU path to slice by, or `ANY_LENGTH`: then the whole
        capacity is read, and what `lengths` excludes is hidden. Not for kernels.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[SchemeConfig]]
    citation: ClassVar[str]
    append_op: Any
    attend_op: Any

    @abstractmethod
    def check(self, config: Config, shape: CacheShape) -> str | None:
        """Say why a site of this shape cannot be stored by this scheme, or None if it can."""

    @abstractmethod
    def state_spec(self, config: Config, role: Role, shape: CacheShape) -> dict[str, TensorSpec]:
        """Name every state tensor of one half, in the order in which the ops take them."""

    @abstractmethod
    def constants(self, config: Config) -> tuple[Any, ...]:
        """Trailing int, float or bool operands of both ops."""

    def schedule(self, config: Config, role: Role) -> tuple[int, int] | None:
        """Return (window, step) of one half, in tokens: see `packed_length`. None: nothing is ever packed."""
        return None

    def packed_length(self, config: Config, role: Role, length: int, packed: int) -> int:
        """Return how many tokens of this half are codes once `length` tokens are stored, given `packed` before.

        Whole steps outside the window. The ops compute the same number on the device from `lengths`, and other hosts
        of exported programs from the `schedule` in the manifest.
        """
        schedule = self.schedule(config, role)
        if schedule is None:
            return 0
        window, step = schedule
        return max(packed, (length - window) // step * step)

    @abstractmethod
    def read(self, config: Config, role: Role, state: Mapping[str, Tensor], packed: int, length: int) -> Tensor:
        """Dequantize the first `length` tokens, dense `[batch, num_kv_heads, length, head_dim]`.

        In logical dtype, or in fp32 where no state tensor tells it.
        """

    @abstractmethod
    def rewind(
        self, config: Config, role: Role, state: Mapping[str, Tensor], packed: int, in_ring: int, length: int
    ) -> int:
        """Forget every token from `length` on, in place; return the new packed length.

        Tokens of a group that is cut in two go back to the residual window: the newest `in_ring` of the packed tokens
        are still there and stay as they are, older ones come back as their dequantized values. It must be called for
        both halves whenever tokens are forgotten, also where `length >= packed`: the keys' groups may require that
        values are unpacked, too.
        """

    def ring_rows(self, config: Config) -> int:
        """Return how many of the newest tokens written stay in full precision, packed or not; 0 promises none."""
        return 0

    def pages_needed(self, config: Config, length: int) -> int:
        """Pages that storing `length` tokens takes; at least 1."""
        return max(1, -(-length // PAGE))
