"""Memory of a long decode: bytes of the cache and peak over the weights, beside the stock cache in the same run.

`python -m benchmarks.memory --shape llama-2-7b --length 2048,8192` on a GPU. The prompt is read in chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ottfx
from benchmarks.configurations import (
    CONFIGURATIONS,
    FORWARD_ONLY,
    add_model_options,
    configured,
    model_labels,
    model_notes,
    model_of,
    new_cache,
    quantization_of,
    whole_numbers,
)
from benchmarks.plots import add_plots_option, draw_if_asked, require_matplotlib
from benchmarks.runner import Case, command_line, free_memory, run_cases
from benchmarks.timing import allocated_bytes, host_seconds, peak_bytes, reset_peak


class Decoding:
    """A greedy decode through one cache, by calls of the model's forward."""

    def __init__(self, model: PreTrainedModel, past: Any) -> None:
        self.model = model
        self.past = past
        self.next_token: Tensor | None = None

    def read(self, ids: Tensor, chunk: int) -> None:
        """Read int64 [batch, tokens] in calls of `chunk` tokens."""
        for part in ids.split(chunk, dim=1):
            self._call(part)

    def decode(self, steps: int) -> None:
        """Decode `steps` tokens one by one."""
        for _ in range(steps):
            assert self.next_token is not None, "read a prompt first"
            self._call(self.next_token)

    def _call(self, ids: Tensor) -> None:
        out = self.model(ids, past_key_values=self.past, logits_to_keep=1)
        self.past, self.next_token = out.past_key_values, out.logits[:, -1:].argmax(-1)


def measure(model: PreTrainedModel, name: str, prompt: Tensor, new_tokens: int, chunk: int) -> dict[str, Any]:
    """Read the prompt, decode, and return bytes and seconds. The model is compiled already, if it is to be."""
    device = prompt.device.type
    decoding = Decoding(model, new_cache(model, CONFIGURATIONS[name], prompt.shape[1] + new_tokens))
    weights = allocated_bytes(device)
    reset_peak(device)
    prefill_seconds = host_seconds(lambda: decoding.read(prompt, chunk), device)
    prefill_peak = peak_bytes(device, weights)
    decoding.decode(1)
    reset_peak(device)
    seconds = host_seconds(lambda: decoding.decode(new_tokens - 1), device)
    footprint = ottfx.memory_footprint(decoding.past)
    return {
        "length": decoding.past.get_seq_length(),
        "cache_bytes": footprint.total,
        "dense_cache_bytes": footprint.dense_total,
        "cache_ratio": footprint.ratio,
        "prefill_peak_bytes": prefill_peak,
        "decode_peak_bytes": peak_bytes(device, weights),
        "prefill_seconds": prefill_seconds,
        "decode_step_ms": 1e3 * seconds / (new_tokens - 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the stock cache, then ottfx, with the same weights and tokens."""
    parser = command_line(__doc__, "memory")
    add_model_options(parser)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=whole_numbers, default=[8192], help="tokens in the cache at the end")
    parser.add_argument("--new-tokens", type=int, default=256, help="of these, tokens decoded one by one")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of one prefill call")
    add_plots_option(parser)
    options = parser.parse_args(arguments)
    require_matplotlib(parser, options.plots)
    if options.tiny:
        options.shape, options.batch_size, options.new_tokens, options.chunk = "tiny", 2, 4, 128
        options.length = [300, 400][: len(options.length)]

    model_once = cache(lambda: model_of(options))

    def run(name: str, length: int) -> dict[str, Any]:
        model = model_once()
        torch.manual_seed(0)  # the same tokens for each configuration
        prompt = torch.randint(1, model.config.vocab_size, (options.batch_size, length), device=options.device)
        with configured(model, CONFIGURATIONS[name], quantization_of(options)), torch.no_grad():
            # More chunks than one compile a second graph. It must not see two equal lengths: it would keep them equal.
            warm = prompt[:, :512]
            measure(model, name, warm, 3, warm.shape[1] if options.chunk >= length else 2 * warm.shape[1] // 3)
            free_memory()
            return measure(model, name, prompt, options.new_tokens, options.chunk)

    names = ("dynamic-eager", "ottfx")
    cases = [
        Case(
            labels={
                **model_labels(options),
                "batch_size": options.batch_size,
                "prompt": length - options.new_tokens,
                "new_tokens": options.new_tokens,
                "chunk": options.chunk,
                "configuration": name,
            },
            measure=partial(run, name, length - options.new_tokens),
            quick=True,
            default=name in names,
        )
        for length, name in product(options.length, FORWARD_ONLY)
    ]
    status = run_cases(cases, options, model_notes(options))
    draw_if_asked(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
