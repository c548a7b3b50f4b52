"""Tables of `benchmarks.append`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.tables.markdown import Row, number, size, table


def packing(rows: Sequence[Row]) -> str:
    """Packing a prompt against a read and a copy of it, and the append of a decode step."""
    encode = [
        [
            size(row["tokens"]),
            row["scheme"],
            number(row["us"], "{:.0f}"),
            number(row["times_read"], "{:.2f}x"),
            number(row["times_copy"], "{:.2f}x"),
        ]
        for row in rows
        if row["kind"] == "encode" and row["us"]
    ]
    decode = [
        [
            size(row["tokens"]),
            row["scheme"],
            *(number(row[column], "{:.2f}") for column in ("step_us", "flush_us", "us")),
        ]
        for row in rows
        if row["kind"] == "decode" and row["us"]
    ]
    sizes = "batch x kv heads x tokens"
    whole = table([sizes, "scheme", "whole prompt, us", "of a read", "of a copy"], encode)
    step = table([sizes, "scheme", "a step, us", "with a flush, us", "mean, us"], decode)
    return f"{whole}\n\n{step}"
