"""Tables of the benchmarks that run a whole model: memory, compile time, artifacts."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.tables.markdown import Row, count, groups, model_title, number, table

WAYS_TO_START = {
    "compiled": "`ottfx.compile`, empty disk caches",
    "compiled-warm": "`ottfx.compile`, filled disk caches",
    "artifact": "`ottfx.load`",
}


def memory(rows: Sequence[Row]) -> str:
    """Bytes of a cache and peaks, the stock cache beside each other one."""
    names = {
        "cache_bytes": "bytes of the cache, everything counted",
        "prefill_peak_bytes": "peak over the weights, prompt included",
        "decode_peak_bytes": "peak over the weights while decoding",
    }
    parts = []
    for group in groups(rows, "shape", "layers", "batch_size", "prompt", "new_tokens"):
        group = [row for row in group if row.get("cache_bytes")]
        dense = next((row for row in group if row["cache_bytes"] == row["dense_cache_bytes"]), None)
        if dense is None:
            continue
        others = [row for row in group if row is not dense]
        tokens = f"{count(dense['prompt'])} prompt tokens + {count(dense['new_tokens'])} decoded"
        title = f"{model_title(dense)}, batch {dense['batch_size']}, {tokens}:"
        columns = ["", _way(dense), *(cell for row in others for cell in (_way(row), ""))]
        cells = []
        for column, meaning in names.items():
            line = [meaning, number(dense[column], "{:.2f} GB", 1e-9)]
            for row in others:
                smaller = float(dense[column]) / float(row[column]) if dense[column] and row[column] else None
                line += [number(row[column], "{:.2f} GB", 1e-9), "" if smaller is None else f"{smaller:.2f}x smaller"]
            cells.append(line)
        parts.append(f"{title}\n\n{table(columns, cells)}")
    return "\n\n".join(parts)


def compile_time(rows: Sequence[Row]) -> str:
    """Seconds until a prompt and three steps are done, with empty and with filled disk caches."""
    calls = ("first_prompt_s", "first_step_s", "second_step_s", "third_step_s")
    cells = [
        [
            f"{row['shape']}, {row['layers']} layers",
            row["configuration"],
            *(number(row[name], "{:.1f}") for name in calls),
            *(f"{sum(float(row[prefix + name]) for name in calls):.1f}" for prefix in ("", "warm_")),
        ]
        for row in rows
        if row.get("first_prompt_s")
    ]
    columns = ["shape", "configuration", "prompt, s", "first step, s", "second, s", "third, s"]
    return table([*columns, "all of them, s", "with filled caches, s"], cells)


def _way(row: Row) -> str:
    return row.get("configuration") or row["cache"]


def artifact(rows: Sequence[Row]) -> str:
    """Seconds to the first tokens of an artifact and of a compiled model."""
    parts = []
    for group in groups(rows, "card", "shape", "layers"):
        slowest = max(float(row["first_token_s"]) for row in group if row["first_token_s"])
        cells = [
            [
                WAYS_TO_START[row["configuration"]],
                number(row["first_token_s"], "{:.2f} s"),
                f"{slowest / float(row['first_token_s']):.1f}x" if row["first_token_s"] else "",
                number(row["second_token_s"], "{:.2f} s"),
                number(row["step_ms"], "{:.1f} ms"),
            ]
            for row in group
        ]
        made = [
            f"The export took {float(row['export_s']):.0f} s, the file has {float(row['file_mib']):.0f} MiB."
            for row in group
            if row.get("export_s")
        ]
        title = f"{model_title(group[0])}, on {group[0]['card']}:"
        columns = ["", "first token", "as soon", "second token", "a decode step"]
        parts.append("\n\n".join([title, table(columns, cells), *made]))
    return "\n\n".join(parts)
