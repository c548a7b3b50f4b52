"""Memory of a long decode: bytes of the cache and peak over the weights, beside the stock cache in the same run.

`python -m benchmarks.memory --shape llama-2-7b --batch-size 8 --length 8192` on a GPU.
"""

from __future__ import annotations

import gc
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import ottfx
from benchmarks.results import write_csv
from benchmarks.shapes import random_model

console = Console()


def measure(model: Any, tokens: torch.Tensor, new_tokens: int, chunk: int) -> dict[str, float]:
    """Prefill `tokens` in chunks, decode greedily, and return bytes and seconds."""
    device = tokens.device
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    cache = None
    with torch.no_grad():
        started = time.perf_counter()
        for part in tokens.split(chunk, dim=1):
            out = model(part, past_key_values=cache, logits_to_keep=1)
            cache = out.past_key_values
        torch.cuda.synchronize(device)
        prefill_seconds = time.perf_counter() - started
        prefill_peak = torch.cuda.max_memory_allocated(device) - weights
        next_token = out.logits[:, -1:].argmax(-1)
        out = model(next_token, past_key_values=cache, logits_to_keep=1)
        cache, next_token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        for _ in range(new_tokens - 1):
            out = model(next_token, past_key_values=cache, logits_to_keep=1)
            cache, next_token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    footprint = ottfx.memory_footprint(cache)
    return {
        "length": cache.get_seq_length(),
        "cache_bytes": footprint.total,
        "dense_cache_bytes": footprint.dense_total,
        "cache_ratio": footprint.ratio,
        "prefill_peak_bytes": prefill_peak,
        "decode_peak_bytes": torch.cuda.max_memory_allocated(device) - weights,
        "prefill_seconds": prefill_seconds,
        "decode_step_ms": 1000 * seconds / max(new_tokens - 1, 1),
    }


def main(
    shape: Annotated[str, typer.Option(help="a name of benchmarks/shapes.py")] = "llama-2-7b",
    batch_size: int = 8,
    length: Annotated[int, typer.Option(help="tokens in the cache at the end")] = 8192,
    new_tokens: Annotated[int, typer.Option(help="of these, tokens decoded one by one")] = 256,
    chunk: Annotated[int, typer.Option(help="tokens of one prefill call")] = 8192,
    layers: Annotated[int | None, typer.Option(help="replaces the shape's number of layers")] = None,
    scheme: str = "ott",
    bits: int = 2,
    lower: str = "inductor",
    out: Path = Path("benchmarks/results/memory.csv"),
) -> None:
    """Measure the stock cache, then ottfx, with the same weights and tokens."""
    model = random_model(shape, device="cuda", dtype=torch.bfloat16, num_layers=layers)
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, length - new_tokens), device="cuda")
    conditions = {
        "shape": shape,
        "layers": model.config.num_hidden_layers,
        "batch_size": batch_size,
        "dtype": "bfloat16",
        "prompt": prompt.shape[1],
        "new_tokens": new_tokens,
        "chunk": chunk,
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    rows = [{**conditions, "cache": "DynamicCache eager", **measure(model, prompt, new_tokens, chunk)}]
    console.print(rows[0])
    started = time.perf_counter()
    ottfx.compile(model, bits, scheme=scheme, lower=lower)
    warm = prompt[:, :chunk] if chunk < prompt.shape[1] else prompt[:, :512]
    measure(model, warm, 3, max(chunk // 2, 256) if chunk < prompt.shape[1] else 512)
    console.print(f"compiled in {time.perf_counter() - started:.0f} s")
    rows.append({**conditions, "cache": f"{scheme}-{bits} {lower}", **measure(model, prompt, new_tokens, chunk)})
    console.print(rows[1])
    stock, ours = rows
    table = Table("", "stock", "ottfx", "ratio")
    for key in ("cache_bytes", "prefill_peak_bytes", "decode_peak_bytes", "decode_step_ms"):
        table.add_row(key, f"{stock[key]:,.0f}", f"{ours[key]:,.0f}", f"{stock[key] / ours[key]:.2f}x")
    console.print(table)
    write_csv(out, rows)


if __name__ == "__main__":
    typer.run(main)
