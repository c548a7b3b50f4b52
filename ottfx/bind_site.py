"""How a door gives one attention site its scheme, or says why it cannot."""

from __future__ import annotations

from typing import Any

from ottfx.attention_site import AttentionSite, Binding, Refusal
from ottfx.passes.graph_utils import node_value
from ottfx.registry import get_scheme
from ottfx.schemes.base import CacheShape, SchemeConfig


def bind_site(site: AttentionSite, config: SchemeConfig, *, row: int, pages: Any) -> Binding | Refusal:
    """Bind a site to the scheme of its config, with the sizes and the device of its new keys.

    Args:
        site: matched in a graph that knows the values of its nodes.
        config: of this layer (`SchemeConfig.at_layer`).
        row: of the site in the `lengths` of the call.
        pages: capacity, an int or a SymInt.

    Returns:
        A `Refusal` if the scheme cannot store such a site.
    """
    scheme = get_scheme(config.scheme)
    key = node_value(site.key)
    shape = CacheShape(
        batch_size=key.shape[0],
        num_kv_heads=int(key.shape[1]),
        head_dim=int(key.shape[3]),
        pages=pages,
        dtype=key.dtype,
        device=key.device,
    )
    reason = scheme.check(config, shape)
    if reason is not None:
        return Refusal(index=site.index, name=site.name, reason=reason)
    return Binding(site=site, scheme=scheme, config=config, row=row, shape=shape)
