"""Tables of `benchmarks.attention`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.shapes import parse_workload
from benchmarks.tables.markdown import Row, groups, heads, number, size, table

BASELINE = "2b-g128"
PEERS = ("sdpa-", "flex")
LONG = 4096
"""Tokens from which a cache counts as long in the headline."""


def steps(rows: Sequence[Row]) -> str:
    """One new token, 2 bits, groups of 128: codes alone, and the complete op, against the best peer."""
    cells = []
    for group in groups([row for row in rows if row["query"] == "q1"], "shape", "workload"):
        whats = _by_what(group)
        packed, complete = (whats.get(f"{BASELINE}-{part}") for part in ("packed", "complete"))
        if packed is None or complete is None:
            continue
        peers = [row for what, row in whats.items() if what.startswith(PEERS)]
        best = min(peers, key=lambda row: float(row["us"]), default=None)
        cells.append(
            [
                heads(packed),
                size(packed["workload"]),
                "not measured" if best is None else f"{float(best['us']):.0f} ({best['what'].removeprefix('sdpa-')})",
                f"{number(packed['us'], '{:.1f}')} ({number(packed['GB_s'], '{:.0f}')})",
                number(packed.get("speedup_over_best_peer"), "{:.2f}x"),
                number(complete["us"], "{:.1f}"),
                number(complete.get("speedup_over_best_peer"), "{:.2f}x"),
            ]
        )
    columns = ["heads x channels", "batch x length", "best bf16 peer, us", "packed part, us (GB/s)", "speed-up"]
    return table([*columns, "complete op, us", "speed-up"], cells)


def widths(rows: Sequence[Row]) -> str:
    """Bits and group sizes of the complete op, where others than 2 bits and 128 were measured."""
    cells = []
    for group in groups([row for row in rows if row["query"] == "q1"], "shape", "workload"):
        complete = [row for row in group if row["what"].endswith("-complete") and row.get("us")]
        if len(complete) < 2:
            continue
        for row in complete:
            bits, tokens = row["what"].split("-")[:2]
            cells.append(
                [
                    heads(row),
                    size(row["workload"]),
                    f"{bits[:-1]}-bit, G = {tokens[1:]}",
                    f"{number(row['us'], '{:.1f}')} ({number(row['GB_s'], '{:.0f}')})",
                    number(row.get("speedup_over_best_peer"), "{:.2f}x"),
                ]
            )
    return table(["heads x channels", "batch x length", "codes", "complete op, us (GB/s)", "speed-up"], cells)


def schemes(rows: Sequence[Row]) -> str:
    """The complete op of `ott` and of `ott+`, at each width that both were measured at."""
    cells = []
    for group in groups([row for row in rows if row["query"] == "q1"], "shape", "workload"):
        whats = _by_what(group)
        for bits in (2, 3, 4):
            plain, plus = (whats.get(f"{bits}b-g128-{part}") for part in ("complete", "plus"))
            if plain is None or plus is None:
                continue
            ratio = float(plus["us"]) / float(plain["us"])
            times = [number(row["us"], "{:.1f}") for row in (plain, plus)]
            cells.append([heads(plain), size(plain["workload"]), f"{bits}-bit", *times, f"{ratio - 1:+.1%}"])
    return table(["heads x channels", "batch x length", "codes", "`ott`, us", "`ott+`, us", "difference"], cells)


def queries(rows: Sequence[Row]) -> str:
    """The complete op at several numbers of new tokens."""
    columns = sorted({row["query"] for row in rows}, key=lambda query: int(query[1:]))
    cells = []
    for group in groups([row for row in rows if row["what"] == f"{BASELINE}-complete"], "shape", "workload"):
        times = {row["query"]: row["us"] for row in group}
        if len(times) > 1:
            row = group[0]
            each = [number(times.get(column), "{:.1f}") for column in columns]
            cells.append([heads(row), size(row["workload"]), *each])
    return table(["heads x channels", "batch x length", *(f"{column[1:]} new, us" for column in columns)], cells)


def headline(rows: Sequence[Row]) -> str:
    """One sentence: the range of speed-ups of long caches."""
    ratios = [
        float(row["speedup_over_best_peer"])
        for row in rows
        if row["query"] == "q1" and row["what"] == f"{BASELINE}-complete" and row.get("speedup_over_best_peer")
        if parse_workload(row["workload"])[1] >= LONG
    ]
    if not ratios:
        return "Not measured yet."
    return (
        "Attention of one decode step over 2-bit codes, outliers and full-precision window included, is\n"
        f"{min(ratios):.2f} to {max(ratios):.2f} times as fast as the fastest bf16 attention in the same run, "
        f"for caches of {LONG:,} tokens and more."
    )


def _by_what(rows: Sequence[Row]) -> dict[str, Row]:
    return {row["what"]: row for row in rows if row.get("us")}
