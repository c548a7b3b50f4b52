"""The attention of one decode step: the packed cache against bf16 peers, in the same run.

`python -m benchmarks.attention --time-limit 500` on a GPU. Case names: SHAPE/BATCHxLENGTH/qN/WHAT.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.compiled_kernels import NewKernels, compile_in_parallel
from benchmarks.packed_state import bytes_read, lengths, operands, random_halves
from benchmarks.plots import add_plots_option, draw_if_asked, require_matplotlib
from benchmarks.runner import Case, command_line, run_cases, select
from benchmarks.shapes import Heads, heads_of, parse_workload
from benchmarks.timing import device_microseconds, read_ceiling
from ottfx.schemes.ott import OTTConfig
from ottfx.schemes.ott_plus import OTTPlusConfig

SHAPES = ("llama-2-7b", "llama-3-8b", "qwen3-8b", "qwen3-32b", "gemma-3-4b", "llama-3.2-1b")
WORKLOADS = ("8x32k", "1x128k", "64x4k", "256x1k", "32x32k")
SWEEP = ("8x1k", "8x2k", "8x4k", "8x8k", "8x16k", "8x64k", "8x128k")
"""Measured on demand: time against length, together with 8x32k (`--only 'llama-3-8b/8x*/q1/[s2]*'`)."""
SHORT = ("96x352", "640x352")
"""Large batches of short sequences, measured on demand."""
FEW = ("1x4k", "1x32k")
"""Single sequences, likewise."""
QUERY_LENGTHS = (1, 2, 4)
WIDTHS = (2, 3, 4)
GROUP_SIZES = (128, 64, 32)
PARTS = ("packed", "complete", "plus")
"""`packed`: codes only. `complete`: the window and the outlier pool as well. `plus`: `ott+`, window and seats."""
PEERS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CPU_PEERS = {"sdpa-math": SDPBackend.MATH}
RESIDUAL = 32
POOL = (3, 3)
QUICK_SHAPES = ("llama-2-7b", "llama-3-8b")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One packed cache and its query."""

    heads: Heads
    batch_size: int
    length: int
    q_len: int
    bits: int
    group_size: int
    part: str
    dtype: torch.dtype
    device: str

    def config(self) -> OTTConfig:
        """How the cache is stored."""
        if self.part == "plus":
            return OTTPlusConfig(bits=self.bits, group_size=self.group_size, residual_length=RESIDUAL)
        complete = self.part != "packed"
        return OTTConfig(
            bits=self.bits,
            group_size=self.group_size,
            value_group_size=self.heads.head_dim,
            residual_length=RESIDUAL if complete else 0,
            outlier_capacity=POOL[0] if complete else 0,
            spill_capacity=POOL[1] if complete else 0,
            exempt_layers=(),
        )


class Measurement:
    """Measures cases, and remembers what later rows are compared with: the read ceiling and the best peer."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ceiling = float("nan")
        self.best_peer: dict[tuple[Heads, int, int, int], float] = {}

    def packed(self, setting: Setting) -> dict[str, Any]:
        """Time the attend op over a random packed cache."""
        halves, call = attend_call(setting)
        compiled = NewKernels()
        microseconds = device_microseconds(call, self.device)
        row = self._row(setting, bytes_read(halves), microseconds)
        best = self.best_peer.get(_key(setting))
        speedup = None if best is None else best / microseconds
        return row | {"speedup_over_best_peer": speedup, "compiled": compiled.summary()}

    def peer(self, setting: Setting, backend: SDPBackend | None) -> dict[str, Any]:
        """Time dense attention over the same number of tokens: one backend of SDPA, or compiled FlexAttention."""
        query, key, value = dense_inputs(setting)
        grouped = setting.heads.num_heads != setting.heads.num_kv_heads
        if backend is None:
            from torch.nn.attention.flex_attention import flex_attention

            flex = torch.compile(flex_attention, dynamic=False)
            microseconds = device_microseconds(lambda: flex(query, key, value, enable_gqa=grouped), self.device)
        else:
            with sdpa_kernel(backend):
                microseconds = device_microseconds(
                    lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped), self.device
                )
        best = self.best_peer.get(_key(setting), microseconds)
        self.best_peer[_key(setting)] = min(best, microseconds)
        return self._row(setting, key.nbytes + value.nbytes, microseconds)

    def _row(self, setting: Setting, nbytes: int, microseconds: float) -> dict[str, Any]:
        rate = nbytes / microseconds * 1e6
        tokens = setting.batch_size * setting.length * setting.heads.num_kv_heads
        return {
            "us": microseconds,
            "bytes_a_token_and_head": nbytes / tokens,
            "GB_s": rate / 1e9,
            "of_read_ceiling": rate / self.ceiling,
        }


def _key(setting: Setting) -> tuple[Heads, int, int, int]:
    return setting.heads, setting.batch_size, setting.length, setting.q_len


def dense_inputs(setting: Setting, tokens: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return a random query of the setting, and keys and values of `tokens` tokens (None: the whole cache)."""
    heads = setting.heads
    made: dict[str, Any] = {"dtype": setting.dtype, "device": setting.device}
    tokens = setting.length if tokens is None else tokens
    query = torch.randn(setting.batch_size, heads.num_heads, setting.q_len, heads.head_dim, **made)
    key = torch.randn(setting.batch_size, heads.num_kv_heads, tokens, heads.head_dim, **made)
    return query, key, torch.randn_like(key)


def attend_call(setting: Setting) -> tuple[Any, Any]:
    """Return a random packed cache and a function that attends over it and over `q_len` new tokens.

    The function calls the op that a rewritten graph calls: Triton kernels on CUDA, the definition on the CPU.
    """
    config = setting.config()
    halves = random_halves(
        config,
        batch_size=setting.batch_size,
        num_kv_heads=setting.heads.num_kv_heads,
        head_dim=setting.heads.head_dim,
        length=setting.length + config.residual_length,
        dtype=setting.dtype,
        device=setting.device,
    )
    query, key, value = dense_inputs(setting, setting.q_len)
    past, scale = halves[0].high, setting.heads.head_dim**-0.5
    where, last = lengths(halves), operands(halves)
    return halves, lambda: halves[0].scheme.attend_op(query, key, value, None, where, 0, past, scale, *last)


def compile_one(setting: Setting) -> None:
    """Compile the kernels of a setting; runs in a process of its own."""
    attend_call(setting)[1]()


def plan(measurement: Measurement, tiny: bool) -> Iterator[tuple[Case, Setting]]:
    """Yield all cases with what they measure, peers before the rows that are compared with them."""
    device = measurement.device
    shapes, workloads = (("tiny",), ("2x256", "2x512")) if tiny else (SHAPES, (*WORKLOADS, *SWEEP, *SHORT, *FEW))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    peers: Mapping[str, SDPBackend | None] = CPU_PEERS if device == "cpu" else {**PEERS, "flex": None}
    variants = [
        (f"{b}b-g{g}-{part}", b, g, part)
        for b, g, part in product(WIDTHS, GROUP_SIZES, PARTS)
        if part != "plus" or (b in (2, 4) and g == 128)
    ]
    for workload, shape, q_len in product(workloads, shapes, QUERY_LENGTHS):
        heads = heads_of(shape)
        batch_size, length = parse_workload(workload)
        # Shapes with the same heads, and the largest caches, are measured on demand.
        usual = (
            shape != "qwen3-8b"
            and workload not in (*SWEEP, *SHORT, *FEW)
            and (workload != "32x32k" or heads.num_kv_heads <= 8)
        )
        grids = workload == workloads[0]
        short = grids and shape in (*QUICK_SHAPES, "tiny") and q_len == 1
        grouped = heads.num_heads != heads.num_kv_heads
        # The memory-efficient kernels do not take fewer kv heads than heads.
        fitting = [(peer, 2, 128, "dense") for peer in peers if not (grouped and peer == "sdpa-efficient")]
        for what, bits, group_size, part in fitting + variants:
            setting = Setting(
                heads=heads,
                batch_size=batch_size,
                length=length,
                q_len=q_len,
                bits=bits,
                group_size=group_size,
                part=part,
                dtype=dtype,
                device=device,
            )
            plain = (bits, group_size) == (2, 128) and what != "flex"
            wanted = grids if plain else grids and q_len == 1
            case = Case(
                labels={"shape": shape, "workload": workload, "query": f"q{q_len}", "what": what},
                measure=partial(measurement.peer, setting, peers[what])
                if part == "dense"
                else partial(measurement.packed, setting),
                quick=short and plain,
                default=what != "flex" and usual and (wanted or (plain and q_len == 1)),
            )
            yield case, setting


def smallest(settings: Iterable[Setting]) -> list[Setting]:
    """Return one small setting for each set of kernels that the packed ones of `settings` need."""
    small = [replace(s, batch_size=1, length=256) for s in settings if s.part != "dense"]
    return list(dict.fromkeys(small))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command_line(__doc__, "attention")
    parser.add_argument("--compile-jobs", type=int, default=0, help="processes that compile all kernels beforehand")
    add_plots_option(parser)
    options = parser.parse_args(arguments)
    require_matplotlib(parser, options.plots)
    measurement = Measurement(options.device)
    settings = {case: setting for case, setting in plan(measurement, options.tiny)}
    notes = []
    if not options.list:
        if options.compile_jobs:
            chosen = smallest(settings[case] for case in select(settings, options))
            compile_in_parallel(compile_one, chosen, options.compile_jobs)
        measurement.ceiling = read_ceiling(options.device, 1 << 20 if options.tiny else 2 << 30)
        notes = [f"Read ceiling (`torch.sum`): {measurement.ceiling / 1e9:.0f} GB/s."]
        print(notes[0])
    status = run_cases(settings, options, notes)
    draw_if_asked(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
