"""`AttentionSite`: one attention with a KV cache, found in a graph; `Refusal`: one that was left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from ottfx.schemes.base import CacheShape, Scheme, SchemeConfig


@dataclass(kw_only=True)
class AttentionSite:
    """One `scaled_dot_product_attention` whose keys and values are a KV cache that this graph extends.

    Every field is a node of the graph unless said otherwise. Shapes as in `Scheme`.
    """

    index: int
    """Number of this candidate in graph order, counted over rewritten and refused ones: the layer, as a rule."""
    name: str
    """What a reader calls it: the module path when the graph knows it, otherwise the node's name."""
    attention: Node
    """The attention node itself."""
    query: Node
    """[batch, num_heads, q_len, head_dim]."""
    key: Node
    """The new keys [batch, num_kv_heads, q_len, head_dim], before any repetition for grouped heads."""
    value: Node
    past_key: Node | None
    """The placeholder that holds the stored keys, or None for a fresh prompt."""
    past_value: Node | None
    full_key: Node
    """Past and new keys together (the `cat`, or `key` itself for a fresh prompt): the value the graph returns."""
    full_value: Node
    mask: Node | None
    """Mask operand as the attention takes it: 4-D, or 2-D [q_len, kv_len] (the rewrite makes it 4-D), or None."""
    is_causal: bool
    softmax_scale: float
    """The factor on query @ key^T; 1/sqrt(head_dim) if the node gave none."""
    key_path: tuple[Node, ...] = ()
    """Nodes between the attention's key operand and `full_key` (repetition of heads, copies), nearest to it first."""
    value_path: tuple[Node, ...] = ()

    @property
    def kind(self) -> Literal["prompt", "continue"]:
        """`prompt`: no past, attention stays dense. `continue`: attends over stored tokens."""
        return "prompt" if self.past_key is None else "continue"


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What a door decided for one site: how its cache is stored."""

    site: AttentionSite
    scheme: Scheme
    config: SchemeConfig
    """Options of this layer (`SchemeConfig.at_layer`)."""
    row: int
    """Row of this site in the `lengths` tensor of the call."""
    shape: CacheShape
    """Sizes of either half."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An attention with a cache that is left exactly as it was."""

    index: int
    name: str
    reason: str
