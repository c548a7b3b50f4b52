"""The kinds of cache that can be saved, taken apart into layers of plain values and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ottfx.artifacts.program_cache import ProgramCache
from ottfx.errors import ArtifactError


@dataclass(frozen=True, kw_only=True)
class NoAttributes:
    """Of a layer that is its keys and values."""


@dataclass(frozen=True, kw_only=True)
class SlidingAttributes:
    """What a DynamicSlidingWindowLayer knows beside them."""

    sliding_window: int
    cumulative_length: int
    record_past: bool


LAYER_CLASSES: dict[str, dict[str, type[NoAttributes] | type[SlidingAttributes]]] = {
    "DynamicCache": {"DynamicLayer": NoAttributes, "DynamicSlidingWindowLayer": SlidingAttributes},
    "ProgramCache": {"tuple": NoAttributes},
    "tuple": {"tuple": NoAttributes, "list": NoAttributes},
    "list": {"tuple": NoAttributes, "list": NoAttributes},
}
"""Kinds of cache -> their kinds of layer -> what such a layer knows beside keys and values."""


@dataclass(frozen=True, kw_only=True)
class CacheLayer:
    """One layer of a cache."""

    layer_class: str
    attributes: NoAttributes | SlidingAttributes
    halves: Sequence[Any]
    """Keys and values, or nothing for a layer without any yet."""


def take_apart(cache: Any) -> tuple[str, bool, list[CacheLayer]]:
    """Return what a cache consists of; nothing is copied.

    Returns:
        The name of its class, a key of `LAYER_CLASSES`; whether it makes new layers as a model asks for them; its
        layers, whose halves are tensors, or `CacheHalf`s of a `ProgramCache`.

    Raises:
        ArtifactError: a cache of a kind that cannot be saved.
    """
    if isinstance(cache, ProgramCache):
        return "ProgramCache", False, [_layer("tuple", halves) for halves in cache.layers]
    if type(cache) in (tuple, list):
        for index, pair in enumerate(cache):
            if type(pair) not in (tuple, list) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
                raise _cannot_save(f"a {type(cache).__name__} whose item {index} is {_describe(pair)}")
        return type(cache).__name__, False, [_layer(type(pair).__name__, pair) for pair in cache]
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if type(cache) is not DynamicCache:
        raise _cannot_save(f"a {type(cache).__name__}")
    if cache.offloading:
        raise _cannot_save("a DynamicCache with offloading=True")
    layers = []
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _cannot_save(f"a DynamicCache whose layer {index} is a {type(layer).__name__}")
        name = type(layer).__name__
        kind = LAYER_CLASSES["DynamicCache"][name]
        attributes = kind(**{field.name: getattr(layer, field.name) for field in dataclasses.fields(kind)})
        # Empty: it uses the keys of another layer, or no model has filled it yet.
        halves = (layer.keys, layer.values) if layer.get_seq_length() else ()
        layers.append(CacheLayer(layer_class=name, attributes=attributes, halves=halves))
    return "DynamicCache", cache.layer_class_to_replicate is DynamicLayer, layers


def put_together(cache_class: str, grows: bool, layers: Iterable[CacheLayer]) -> Any:
    """Return the cache that `take_apart` took apart."""
    if cache_class == "ProgramCache":
        return ProgramCache([(key, value) for key, value in (layer.halves for layer in layers)])
    if cache_class != "DynamicCache":
        containers: dict[str, type] = {"tuple": tuple, "list": list}
        return containers[cache_class](containers[layer.layer_class](layer.halves) for layer in layers)
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache()
    cache.layer_class_to_replicate = DynamicLayer if grows else None
    for saved in layers:
        if isinstance(saved.attributes, SlidingAttributes):
            layer = DynamicSlidingWindowLayer(sliding_window=saved.attributes.sliding_window)
        else:
            layer = DynamicLayer()
        if saved.halves:
            layer.lazy_initialization(*saved.halves)
            layer.keys, layer.values = saved.halves
        for name, value in dataclasses.asdict(saved.attributes).items():
            setattr(layer, name, value)
        cache.layers.append(layer)
    return cache


def _layer(layer_class: str, halves: Sequence[Any]) -> CacheLayer:
    return CacheLayer(layer_class=layer_class, attributes=NoAttributes(), halves=halves)


def _cannot_save(got: str) -> ArtifactError:
    return ArtifactError(
        "ottfx.save_cache: expected a transformers DynamicCache (not offloaded, its layers DynamicLayer or "
        f"DynamicSlidingWindowLayer), a tuple or list of (key, value) pairs of tensors, or a ProgramCache. Got {got}. "
        "Of an EncoderDecoderCache save self_attention_cache and run the encoder again; in place of a StaticCache let "
        "the model make its default cache."
    )


def _describe(pair: Any) -> str:
    if isinstance(pair, (tuple, list)):
        return f"a {type(pair).__name__} of ({', '.join(type(item).__name__ for item in pair)})"
    return f"a {type(pair).__name__}"
