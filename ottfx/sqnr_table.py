"""SQNR of results in tables and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ottfx.cache_fidelity import PARTS, Fidelity


def mean_sqnr(fidelity: Fidelity | None) -> str:
    """Return the means over all heads for keys, values and output, such as `9.1 / 8.4 / 12.0`; "" for None."""
    return "" if fidelity is None else " / ".join(_db(fidelity.mean(part)) for part in PARTS)


def sqnr_in_json(fidelity: Fidelity) -> dict[str, dict[str, list[float | None]]]:
    """Return the mean of each layer's heads in dB, by way of filling the cache and by part; None: not finite."""
    return {
        way: {
            part: [db if math.isfinite(db) else None for db in fidelity.layer_means(part, decoded=way == "decoded")]
            for part in PARTS
        }
        for way in ("stored", "decoded")
    }


def sqnr_table(fidelities: Mapping[str, Fidelity]) -> str:
    """Return one Markdown table of each layer's mean SQNR for each way of filling the cache; "" without fidelities.

    Args:
        fidelities: label -> what was measured.
    """
    lines: list[str] = []
    for decoded, title in (
        (False, "SQNR of K / V / attention output by layer, dB: what storing costs (the text as one prompt)"),
        (True, "The same of the cache that was decoded token by token: later layers also got other inputs"),
    ):
        columns = []
        for fidelity in fidelities.values():
            parts = [fidelity.layer_means(part, decoded=decoded) for part in PARTS]
            columns.append([" / ".join(map(_db, layer)) for layer in zip(*parts, strict=True)])
        lines += ["", f"{title}.", "", "| layer | " + " | ".join(fidelities) + " |"]
        lines.append("| --- " * (len(columns) + 1) + "|")
        rows = zip(*columns, strict=True)
        lines += [f"| {layer} | " + " | ".join(cells) + " |" for layer, cells in enumerate(rows)]
    return "\n".join(lines) + "\n" if fidelities else ""


def _db(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f}"
