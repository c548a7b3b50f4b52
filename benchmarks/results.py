"""Results files: one CSV and one Markdown table for each benchmark, with the conditions they were measured under."""

from __future__ import annotations

import csv
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ottfx.versions import installed_version

FOLDER = Path("benchmarks/results")
PACKAGES = ("triton", "transformers")


def conditions(device: str) -> dict[str, str]:
    """Return what every row depends on besides its labels: card, versions of packages, date."""
    card = torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"
    versions = {"torch": torch.__version__, **{name: installed_version(name) or "not installed" for name in PACKAGES}}
    return {"card": card, **versions, "date": date.today().isoformat()}


def write_results(
    path: Path, rows: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], notes: Sequence[str] = ()
) -> None:
    """Write `path`.csv, where `shared` stands in each row, and `path`.md, where it and the notes stand below the table.

    Args:
        path: without suffix; folders are made.
        rows: the columns are the union of theirs, in order of first appearance.
        shared: conditions of all rows.
        notes: sentences for the reader of the Markdown file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.with_name(path.name + ".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *shared])
        writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(as_text(row.get(name)) for name in columns)} |" for row in rows]
    lines += ["", ", ".join(f"{name} {value}" for name, value in shared.items()) + "."]
    lines += [f"\n{note}" for note in notes]
    path.with_name(path.name + ".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_text(value: Any) -> str:
    """Return a cell of a table for people: four digits of a float, thousands of an int, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "/").replace("\n", " ")
