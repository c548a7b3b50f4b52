"""Fills the tables of README.md and docs/ from the results files, so that no measured figure is typed.

`python -m benchmarks.report` writes, `--check` only compares. A block of a document stands between two comments,

    <!-- generated: TABLE from FILE ... -->
    <!-- end -->

where TABLE is one of `TABLES` and each FILE a file of benchmarks/results, or a pattern of some.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results import FOLDER
from benchmarks.tables import append, attention, generate, models, quality
from benchmarks.tables.markdown import Row

ROOT = Path(__file__).parents[1]
TABLES: dict[str, tuple[Callable[[Sequence[Row]], str], str]] = {
    "attention": (attention.steps, "python -m benchmarks.attention"),
    "attention-widths": (attention.widths, "python -m benchmarks.attention"),
    "attention-schemes": (attention.schemes, "python -m benchmarks.attention --only '*/2b-g128-[cp]*'"),
    "attention-queries": (attention.queries, "python -m benchmarks.attention"),
    "attention-headline": (attention.headline, "python -m benchmarks.attention"),
    "append": (append.packing, "python -m benchmarks.append"),
    "generate": (generate.steps, "python -m benchmarks.generate"),
    "generate-headline": (generate.headline, "python -m benchmarks.generate"),
    "generate-largest": (generate.largest, "python -m benchmarks.generate --search-batch"),
    "prefill": (generate.prefill, "python -m benchmarks.prefill"),
    "compile-time": (models.compile_time, "python -m benchmarks.compile_time"),
    "memory": (models.memory, "python -m benchmarks.memory"),
    "artifact": (models.artifact, "python -m benchmarks.artifact"),
    "quality": (quality.variants, "python -m benchmarks.quality"),
    "quality-schemes": (
        quality.variants,
        "ottfx eval --schemes kivi,ott,ott+,turbo,polar,polar_pairs,qjl --bits 2,3,4`, also with `--model gemma3-270m",
    ),
    "quality-parts": (quality.variants, "ottfx eval --schemes ott+ --bits 2 --vary mixed_keys=False --vary ..."),
    "quality-ideas": (
        quality.ideas,
        "python -m benchmarks.quality_ideas`, also with `--model gemma3-270m` and `--model random-qwen2",
    ),
    "layer-budget": (quality.ideas, "python -m benchmarks.layer_budget"),
    "quality-long": (
        quality.variants,
        "ottfx eval --device cuda --schemes kivi,ott+ --bits 2 --vary group_seats=2 --tokens 8192`, also with "
        "`--device cpu`, with `--model gemma3-270m`, and that with `--tokens 32768 --start 31744",
    ),
    "quality-spread": (quality.spread, "python -m benchmarks.quality"),
}
"""Name -> (what makes it of rows, the command that measures them)."""
BEGIN = re.compile(r"<!-- generated: (?P<table>\S+) from (?P<files>\S.*?) -->")
LIKE_A_BEGIN = "<!-- generated"
END = "<!-- end -->"


class BlockError(ValueError):
    """A block that cannot be filled."""


def documents(root: Path = ROOT) -> list[Path]:
    """Return the files that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(text: str, document: Path, folder: Path) -> str:
    """Return the text of a document with all its blocks as the results files have them now.

    Args:
        text: of the document.
        document: where it stands, from which results files are linked.
        folder: of the results files.

    Raises:
        BlockError: a block without an end, or of an unknown table.
    """
    lines: list[str] = []
    inside: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{document.name}, line {number}"
        if line.startswith(LIKE_A_BEGIN):
            match = BEGIN.fullmatch(line)
            if inside or match is None:
                problem = f"block {inside!r} has no {END!r}" if inside else f"expected {BEGIN.pattern!r}"
                raise BlockError(f"{where}: {problem}. Got {line!r}.")
            inside = match["table"]
            lines += [line, *block(inside, match["files"].split(), document, folder, where).splitlines()]
        elif line == END:
            if not inside:
                raise BlockError(f"{where}: {END!r} without a block before it.")
            inside = None
        if not inside:
            lines.append(line)
    if inside:
        raise BlockError(f"{document.name}: block {inside!r} has no {END!r}.")
    return "\n".join(lines) + "\n"


def block(table: str, patterns: Sequence[str], document: Path, folder: Path, where: str) -> str:
    """Return what stands between the comments: the table, its files and conditions, or how to measure it."""
    if table not in TABLES:
        raise BlockError(f"{where}: the table must be one of {list(TABLES)}. Got {table!r}.")
    make, command = TABLES[table]
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    rows = [row for file in files for row in read_rows(file)]
    if not rows:
        return f"Not measured yet: `{command}` makes {' and '.join(f'`{pattern}`' for pattern in patterns)}."
    links = ", ".join(f"[{file.name}]({_link(file, document)})" for file in files)
    return f"{make(rows)}\n\n{conditions(rows)}; `{command}`; {links}."


def _link(file: Path, document: Path) -> str:
    return Path(os.path.relpath(file, document.parent)).as_posix()


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a results file: column -> text."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def conditions(rows: Sequence[Row]) -> str:
    """Return card, versions and dates of rows, each kind of row once."""
    found = dict.fromkeys(
        (
            row.get("card") or row.get("device", ""),
            row.get("versions", "").replace(", ottfx not installed", "")
            or ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "transformers") if row.get(name)),
            row.get("date", "")[:10],
        )
        for row in rows
    )
    return "; ".join(", ".join(part for part in parts if part) for parts in found)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Fill the blocks, or check them. The exit status is 1 if `--check` found a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, show what would change")
    options = parser.parse_args(arguments)
    differs = False
    for document in documents(root):
        before = document.read_text(encoding="utf-8")
        after = filled(before, document, root / FOLDER)
        if before == after:
            continue
        differs = True
        name = document.relative_to(root).as_posix()
        if options.check:
            changes = difflib.unified_diff(
                before.splitlines(), after.splitlines(), name, f"{name}, filled", lineterm=""
            )
            print("\n".join(changes))
        else:
            document.write_text(after, encoding="utf-8")
            print(f"wrote {name}")
    return int(differs and options.check)


if __name__ == "__main__":
    sys.exit(main())
