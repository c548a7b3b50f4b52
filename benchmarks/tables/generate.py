"""Tables of `benchmarks.generate` and `benchmarks.prefill`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.configurations import CONFIGURATIONS, PROMPT_ONLY
from benchmarks.tables.markdown import Row, count, groups, model_title, number, table

WAYS = {**CONFIGURATIONS, **PROMPT_ONLY}
FULL_PRECISION = [name for name, way in WAYS.items() if way.cache in ("dynamic", "static")]
QUANTIZED = [name for name, way in WAYS.items() if way.cache in ("quanto", "hqq")]
OURS = [name for name, way in WAYS.items() if way.cache == "packed"]


def _workload(row: Row) -> str:
    kind, length = row["start"].split()
    return f"{row['batch_size']} x {kind} {count(length)} + {count(row['new_tokens'])}"


def _measured(rows: Sequence[Row], column: str) -> list[Row]:
    return [row for row in rows if row.get(column) and not row.get("error")]


def _fastest(rows: Sequence[Row], names: Sequence[str], column: str) -> Row | None:
    chosen = [row for row in _measured(rows, column) if row["configuration"] in names]
    return min(chosen, key=lambda row: float(row[column]), default=None)


def _time(row: Row) -> str:
    return f"{number(row['step_ms'], '{:.2f}')} ({row['configuration']})"


def steps(rows: Sequence[Row]) -> str:
    """Each configuration on each workload: a step and its parts, the whole run, bytes."""
    parts = []
    for group in groups([row for row in rows if not row.get("largest")], "card", "shape", "layers"):
        cells = []
        for row in group:
            # Storing is amortized where all steps between two flushes were profiled.
            storing = float(row["append_ms"]) / float(row["step_ms"]) if row.get("append_ms") else None
            cells.append(
                [
                    _workload(row),
                    row["configuration"],
                    f"fails: {row['error']}" if row.get("error") else number(row["step_ms"], "{:.2f}"),
                    number(row.get("floor_ms"), "{:.2f}"),
                    number(row.get("device_ms"), "{:.2f}"),
                    number(row.get("idle_ms"), "{:.2f}"),
                    "" if not storing else f"{storing:.1%}",
                    number(row.get("tokens_per_s"), "{:,.0f}"),
                    number(row.get("cache_bytes"), "{:.2f}", 1e-9),
                    number(row.get("peak_bytes"), "{:.2f}", 1e-9),
                ]
            )
        columns = ["batch x start + new", "configuration", "ms a step", "floor, ms", "device busy, ms"]
        columns += ["device idle, ms", "storing", "tokens/s", "cache, GB", "peak over weights, GB"]
        parts.append(f"{model_title(group[0])}:\n\n{table(columns, cells)}")
    return "\n\n".join(parts)


def headline(rows: Sequence[Row]) -> str:
    """The fastest packed configuration of each workload, the fastest one in 16 bits, and transformers' 2 bits."""
    cells = []
    for group in groups(
        [row for row in rows if not row.get("largest")], "card", "shape", "layers", "batch_size", "start"
    ):
        ours, dense, theirs = (_fastest(group, names, "step_ms") for names in (OURS, FULL_PRECISION, QUANTIZED))
        if ours is None or dense is None:
            continue
        cells.append(
            [
                f"{ours['shape']}, {ours['layers']} layers",
                _workload(ours),
                _time(dense),
                "not measured" if theirs is None else _time(theirs),
                _time(ours),
                f"{float(dense['step_ms']) / float(ours['step_ms']):.2f}x",
                f"{float(dense['cache_bytes']) / float(ours['cache_bytes']):.2f}x",
            ]
        )
    columns = ["shape", "batch x start + new", "fastest 16-bit step, ms", "2-bit `QuantizedCache`, ms", "ottfx, ms"]
    return table([*columns, "as fast as 16 bits", "smaller cache"], cells)


def largest(rows: Sequence[Row]) -> str:
    """The largest batch or the longest cache of each configuration."""
    cells = []
    for row in rows:
        if not row.get("largest"):
            continue
        cells.append(
            [
                f"{row['shape']}, {row['layers']} layers",
                _workload(row),
                "batch" if row["largest"] == "batch_size" else "length",
                row["configuration"],
                number(row["step_ms"], "{:.2f}"),
                number(row["tokens_per_s"], "{:,.0f}"),
                number(row.get("peak_bytes"), "{:.2f}", 1e-9),
                row["stopped_by"],
            ]
        )
    columns = ["shape", "batch x start + new", "largest", "configuration", "ms a step", "tokens/s"]
    return table([*columns, "peak over weights, GB", "what stops the next"], cells)


def prefill(rows: Sequence[Row]) -> str:
    """The forward pass of a prompt, against the fastest one that keeps 16 bits."""
    parts = []
    for model in groups(rows, "card", "shape", "layers"):
        cells = []
        for group in groups(model, "batch_size", "prompt"):
            dense = _fastest(group, FULL_PRECISION, "ms")
            for row in _measured(group, "ms"):
                over = "" if dense is None else f"{float(row['ms']) / float(dense['ms']) - 1:+.1%}"
                storing = float(row["append_ms"]) / float(row["ms"]) if row.get("append_ms") else None
                cells.append(
                    [
                        f"{row['batch_size']} x {count(row['prompt'])}",
                        row["configuration"],
                        number(row["ms"], "{:.1f}"),
                        over,
                        "" if not storing else f"{storing:.1%}",
                        number(row["tokens_per_s"], "{:,.0f}"),
                        number(row.get("peak_bytes"), "{:.2f}", 1e-9),
                    ]
                )
        columns = ["batch x prompt", "configuration", "ms", "over the fastest 16-bit", "storing", "tokens/s"]
        parts.append(f"{model_title(model[0])}:\n\n{table([*columns, 'peak, GB'], cells)}")
    return "\n\n".join(parts)
