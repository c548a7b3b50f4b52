"""The ways to run one model that are compared: ottfx, transformers' caches with and without torch.compile."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

import ottfx
from benchmarks.packed_state import random_halves
from benchmarks.shapes import SHAPES, random_model
from ottfx.cache_state import Payload
from ottfx.errors import ConfigError
from ottfx.eval_command import option_value
from ottfx.kv_tensor import KVTensor
from ottfx.registry import make_config
from ottfx.schemes import DEFAULT_SCHEME
from ottfx.schemes.base import SchemeConfig

CacheKind = Literal["packed", "dynamic", "static", "quanto", "hqq"]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to run a model."""

    cache: CacheKind
    compiled: Literal["ottfx", "forward", "generate", "no"]
    """By `ottfx.compile`, by `torch.compile(model.forward)`, by `generate` itself, or not at all."""
    dynamic: bool = True
    """As in `torch.compile`: one graph for all sizes, or one for each."""
    mode: str | None = None
    package: str | None = None
    """What has to be installed."""

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        if self.package is None:
            return True
        parent = self.package.partition(".")[0]
        return find_spec(parent) is not None and find_spec(self.package) is not None


CONFIGURATIONS = {
    "dynamic-eager": Configuration(cache="dynamic", compiled="no"),
    "ottfx": Configuration(cache="packed", compiled="ottfx"),
    "ottfx-graphs": Configuration(cache="packed", compiled="ottfx", mode="reduce-overhead"),
    "dynamic-compiled": Configuration(cache="dynamic", compiled="forward"),
    "static-compiled": Configuration(cache="static", compiled="generate"),
    "quanto": Configuration(cache="quanto", compiled="no", package="optimum.quanto"),
    "hqq": Configuration(cache="hqq", compiled="no", package="hqq"),
}
FORWARD_ONLY = [name for name, way in CONFIGURATIONS.items() if way.cache in ("packed", "dynamic")]
"""Those whose forward can be called without `generate`."""
PROMPT_ONLY = {
    "ottfx-fixed": Configuration(cache="packed", compiled="ottfx", dynamic=False),
    "fixed-compiled": Configuration(cache="dynamic", compiled="forward", dynamic=False),
}
"""Code for a prompt's one size, with which a decode could not go on: the strongest peer, and the same of ottfx."""
QUANTIZED = {"quanto": {"axis_key": 0, "axis_value": 0}, "hqq": {"axis_key": 1, "axis_value": 1}}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What `packed` caches store, and how the rewritten graph is run."""

    scheme: str = DEFAULT_SCHEME
    bits: int = 2
    options: tuple[tuple[str, Any], ...] = ()
    """Other fields of the scheme's config: (name, value)."""
    lower: str = "inductor"

    def config(self) -> SchemeConfig:
        """Options of the scheme."""
        return make_config(self.scheme, None if self.scheme == "none" else self.bits, **dict(self.options))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model, and how ottfx stores its cache."""
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="replaces the shape's number of layers")
    parser.add_argument("--scheme", default=DEFAULT_SCHEME)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument(
        "--option", action="append", default=[], type=scheme_option, metavar="NAME=VALUE",
        help="of the scheme, such as group_size=64 or residual_length=32; may be repeated",
    )  # fmt: skip
    parser.add_argument("--lower", default="inductor", choices=("inductor", "eager"), help="eager: no Inductor")


def scheme_option(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as Python writes it, or else as text."""
    try:
        return option_value(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def whole_numbers(text: str) -> list[int]:
    """Read `1,32,96`."""
    return [int(part) for part in text.split(",")]


def quantization_of(options: argparse.Namespace) -> Quantization:
    """Return what `add_model_options` was told of the packed cache."""
    return Quantization(scheme=options.scheme, bits=options.bits, options=tuple(options.option), lower=options.lower)


def model_of(options: argparse.Namespace) -> PreTrainedModel:
    """Build the model that the options name: bfloat16 on CUDA, float32 on the CPU, which has no fast bfloat16."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return random_model(options.shape, device=options.device, dtype=dtype, num_layers=options.layers)


def model_labels(options: argparse.Namespace) -> dict[str, Any]:
    """Return the columns that name the model of the options."""
    return {
        "shape": options.shape,
        "layers": options.layers or SHAPES[options.shape][1]["num_hidden_layers"],
    }


def model_notes(options: argparse.Namespace) -> list[str]:
    """Return what the options say below the table: how ottfx stores the cache, and how it was compiled."""
    return [f"{quantization_of(options).config().describe()}; {options.lower}."]


@contextmanager
def configured(model: PreTrainedModel, way: Configuration, quantization: Quantization) -> Iterator[None]:
    """Compile the model as a configuration says, inside the block; torch forgets its compiled graphs before and after.

    `lower="eager"` of `quantization` holds for torch.compile as well: its backend is then `eager`.
    """
    torch.compiler.reset()
    try:
        if way.compiled == "ottfx":
            ottfx.compile(
                model, scheme=quantization.config(), mode=way.mode, dynamic=way.dynamic, lower=quantization.lower
            )
        elif way.compiled == "forward":
            model.forward = torch.compile(model.forward, dynamic=way.dynamic, backend=quantization.lower)
        yield
    finally:
        model._compiled_call_impl = None
        # What torch.compile and generate put on the instance.
        for name in ("forward", "_compiled_call", "_last_compile_config"):
            model.__dict__.pop(name, None)
        torch.compiler.reset()


def new_cache(model: PreTrainedModel, way: Configuration, longest: int) -> Any:
    """Return the empty cache of a configuration, with room for `longest` tokens if it is static."""
    if way.cache == "static":
        return StaticCache(config=model.config, max_cache_len=longest)
    if way.cache in QUANTIZED:
        return QuantizedCache(way.cache, model.config, nbits=2, q_group_size=64, **QUANTIZED[way.cache])
    return DynamicCache(config=model.config)


def fill_cache(
    cache: Any,
    model: PreTrainedModel,
    way: Configuration,
    quantization: Quantization,
    *,
    batch_size: int,
    length: int,
    room: int = 1,
) -> None:
    """Put `length` random tokens into an empty cache, without running the model.

    Layers that ottfx stores get random packed storage; all others are updated with random keys and values, as a prompt
    would update them. Packed storage does not grow before `room` tokens have been appended.
    """
    config, dtype, device = model.config, model.dtype, model.device
    num_kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    for index, layer in enumerate(cache.layers):
        if way.cache == "packed" and not layer.is_sliding:
            halves = random_halves(
                quantization.config().at_layer(index),
                batch_size=batch_size,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                length=length,
                dtype=dtype,
                device=device.type,
                room=room,
            )
            key, value = (KVTensor.from_payload(Payload(half, length)) for half in halves)
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
        else:
            shape = (2, batch_size, num_kv_heads, length, head_dim)
            key, value = torch.randn(shape, dtype=dtype, device=device)
            cache.update(key, value, index)
