"""What the tables share: cells, Markdown, rows that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.shapes import heads_of

Row = dict[str, str]
"""A row of a results file: column -> text."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a sentence if it has no rows."""
    rows = list(rows)
    if not rows:
        return "Not measured yet."
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(text: str | None, pattern: str, factor: float = 1.0) -> str:
    """Return a cell: `text` by `factor`, formatted; nothing where nothing was measured."""
    return pattern.format(float(text) * factor) if text else ""


def count(text: str) -> str:
    """Return a whole number with its thousands marked; a word as it is."""
    return f"{int(text):,}" if text.isdecimal() else text


def groups(rows: Sequence[Row], *columns: str) -> list[list[Row]]:
    """Return lists of the rows that agree in some columns, in the order of the file."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(column, "") for column in columns), []).append(row)
    return list(found.values())


def size(text: str) -> str:
    """Return `8x32k` as `8 x 32k`."""
    return text.replace("x", " x ")


def heads(row: Row) -> str:
    """Return heads, kv heads and channels of a row's shape."""
    of_shape = heads_of(row["shape"])
    return f"{of_shape.num_heads} / {of_shape.num_kv_heads} x {of_shape.head_dim}"


def model_title(row: Row) -> str:
    """Return which model a row is of."""
    weights = " ".join(word for word in ("random", row.get("dtype"), "weights") if word)
    return f"{row['shape']} shape, {row['layers']} layers, {weights}"
