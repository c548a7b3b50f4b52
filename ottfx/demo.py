"""The demo's measurement: one prompt through a stock `generate`, in full precision and then with a quantized cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import ottfx
from ottfx.schemes import DEFAULT_SCHEME

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WARM_UP_TOKENS = 4
"""Enough for a prompt and a decode step to be compiled, the latter with a length that is known to change."""

QUESTION = "Who is Sir Walter Elliot, and what does he like to read? Answer in three sentences."


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one greedy `generate` gave, and how long it took."""

    tokens: Tensor
    """The new tokens, int64 [count]."""
    text: str
    cache: Any
    """The cache that `generate` returned, as the model left it."""
    warm_up_seconds: float
    """Time of the run before, which compiles."""
    first_token_seconds: float
    """Time to the first new token."""
    tokens_per_second: float
    """Speed of the tokens after the first; NaN if there is none."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The two generations of one prompt, and the bytes of their caches."""

    prompt_tokens: int
    full: Generation
    quantized: Generation
    full_bytes: int
    """Bytes of the unquantized cache at 16 bits an element, whatever the model's dtype is."""
    quantized_bytes: int
    quantized_parts: dict[str, int]
    """Bytes by what they are for: codes, scales, the full-precision window, the pool, ..."""

    @property
    def common_tokens(self) -> int:
        """New tokens that are equal before the first difference."""
        count = min(len(self.full.tokens), len(self.quantized.tokens))
        same = self.full.tokens[:count] == self.quantized.tokens[:count]
        return int(same.long().cumprod(0).sum())


class _Clock(BaseStreamer):
    """Notes when each token comes. `generate` puts the prompt first, then every token."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.on_token = on_token
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if self.times:
            self.on_token()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def default_prompt(words: int = 450) -> str:
    """A page of *Persuasion* and a question about it: long enough that several groups of tokens are packed."""
    novel = files("ottfx").joinpath("data/persuasion.txt").read_text(encoding="utf-8")
    body = novel[novel.index("Sir Walter Elliot") :]
    excerpt = " ".join(body.split()[:words])
    return f"{excerpt} ...\n\n{QUESTION}"


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    bits: int | None = None,
    scheme: str = DEFAULT_SCHEME,
    max_new_tokens: int = 96,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_token: Callable[[], None] = lambda: None,
) -> Comparison:
    """Answer a chat prompt in full precision, then compile the same model in place and answer it again.

    Args:
        model: any causal language model of transformers; afterwards it is compiled.
        tokenizer: its tokenizer. Its chat template is applied if it has one.
        prompt: the user's message.
        bits: width of a code; None leaves it to the scheme.
        scheme: name of a registered scheme.
        max_new_tokens: most tokens of an answer.
        on_stage: told which part begins: "full", "compile", "quantized".
        on_token: called at each new token of the two timed runs.

    Returns:
        Both answers with their speed, and the sizes of both caches.
    """
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)

    on_stage("full")
    warm_up = _generate(model, inputs, WARM_UP_TOKENS, _Clock(lambda: None))[1]
    full = _timed(model, tokenizer, inputs, max_new_tokens, warm_up, on_token)

    on_stage("compile")
    ottfx.compile(model, bits=bits, scheme=scheme)
    warm_up = _generate(model, inputs, WARM_UP_TOKENS, _Clock(lambda: None))[1]
    on_stage("quantized")
    quantized = _timed(model, tokenizer, inputs, max_new_tokens, warm_up, on_token)

    footprint = ottfx.memory_footprint(quantized.cache)
    return Comparison(
        prompt_tokens=inputs["input_ids"].shape[1],
        full=full,
        quantized=quantized,
        full_bytes=_bytes_at_16_bits(full.cache),
        quantized_bytes=footprint.total,
        quantized_parts=dict(footprint.parts),
    )


def _generate(model: PreTrainedModel, inputs: Any, max_new_tokens: int, clock: _Clock) -> tuple[Any, float]:
    """Run a greedy generate; return its output and its seconds."""
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=clock,
        )
    return output, time.perf_counter() - start


def _timed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    max_new_tokens: int,
    warm_up_seconds: float,
    on_token: Callable[[], None],
) -> Generation:
    clock = _Clock(on_token)
    output, _ = _generate(model, inputs, max_new_tokens, clock)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].cpu()
    begin, first, last = clock.times[0], clock.times[1], clock.times[-1]
    return Generation(
        tokens=tokens,
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        cache=output.past_key_values,
        warm_up_seconds=warm_up_seconds,
        first_token_seconds=first - begin,
        tokens_per_second=(len(tokens) - 1) / (last - first) if len(tokens) > 1 else float("nan"),
    )


def _bytes_at_16_bits(cache: Any) -> int:
    return sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers if layer.keys is not None)
