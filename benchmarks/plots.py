"""Pictures of results files: time against length, throughput against batch, memory against length.

`python -m benchmarks.plots benchmarks/results/generate*_h100.csv --out benchmarks/results/generate_h100`, or the option
`--plots` of a benchmark. A picture needs matplotlib (`pip install 'ottfx[plots]'`), and at least two sizes to be drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.report import conditions, read_rows
from benchmarks.shapes import parse_workload
from benchmarks.tables.markdown import Row, groups


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Lines over a size, both axes logarithmic."""

    name: str
    """What the file's name ends with."""
    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Label -> points."""

    @property
    def is_worth_drawing(self) -> bool:
        """Whether some line has two points."""
        return any(len(points) > 1 for points in self.lines.values())


def _lines(
    rows: Iterable[Row], label: str, x: Callable[[Row], float], column: str, factor: float = 1.0
) -> dict[str, list[tuple[float, float]]]:
    """Points of the rows in which `column` was measured, one line for each value of `label`."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(column) and not row.get("error"):
            lines.setdefault(row.get(label, ""), []).append((x(row), float(row[column]) * factor))
    return {name: sorted(points) for name, points in lines.items()}


def attention_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Time of the op against length, a picture for each shape and batch size."""
    rows = [row | {"batch_size": row["workload"].split("x")[0]} for row in rows if row["query"] == "q1"]
    return [
        Picture(
            name=f"{group[0]['shape']}-batch-{group[0]['batch_size']}-time",
            title=f"Attention of a decode step, {group[0]['shape']}, batch {group[0]['batch_size']}",
            x="tokens in the cache",
            y="microseconds",
            lines=_lines(group, "what", lambda row: parse_workload(row["workload"])[1], "us"),
        )
        for group in groups(rows, "shape", "batch_size")
    ]


def _start(row: Row) -> float:
    return float(row["start"].split()[1])


def _model(row: Row) -> str:
    return f"{row['shape']}, {row['layers']} layers"


def _file_name(row: Row, size: str) -> str:
    return f"{row['shape']}-{row['layers']}-layers-{size.replace(' ', '-')}"


def generate_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Time of a step and bytes of the cache against length, tokens a second against batch size."""
    rows = [row for row in rows if row.get("step_ms")]
    pictures = []
    for group in groups(rows, "shape", "layers", "batch_size", "new_tokens"):
        size = f"batch {group[0]['batch_size']}"
        for kind, y, column, factor in (
            ("time", "milliseconds a decode step", "step_ms", 1.0),
            ("memory", "GB of the cache", "cache_bytes", 1e-9),
        ):
            pictures.append(
                Picture(
                    name=f"{_file_name(group[0], size)}-{kind}",
                    title=f"{_model(group[0])}, {size}",
                    x="tokens at the start",
                    y=y,
                    lines=_lines(group, "configuration", _start, column, factor),
                )
            )
    for group in groups(rows, "shape", "layers", "start", "new_tokens"):
        pictures.append(
            Picture(
                name=f"{_file_name(group[0], group[0]['start'])}-throughput",
                title=f"{_model(group[0])}, {group[0]['start']} + {group[0]['new_tokens']} tokens",
                x="batch size",
                y="tokens a second",
                lines=_lines(group, "configuration", lambda row: float(row["batch_size"]), "tokens_per_s"),
            )
        )
    return pictures


def memory_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Bytes of the cache and peaks against length."""
    columns = {
        "cache_bytes": "the cache",
        "prefill_peak_bytes": "peak over the weights, prompt included",
        "decode_peak_bytes": "peak over the weights while decoding",
    }
    return [
        Picture(
            name=f"{_file_name(group[0], 'batch ' + group[0]['batch_size'])}-{column.removesuffix('_bytes')}",
            title=f"{_model(group[0])}, batch {group[0]['batch_size']}: {meaning}",
            x="tokens in the cache",
            y="GB",
            lines=_lines(group, "configuration", lambda row: float(row["length"]), column, 1e-9),
        )
        for group in groups(rows, "shape", "layers", "batch_size")
        for column, meaning in columns.items()
    ]


PICTURES = {"workload": attention_pictures, "outside_ms": generate_pictures, "chunk": memory_pictures}
"""A column that only this benchmark's rows have -> its pictures."""


def pictures_of(rows: Sequence[Row]) -> list[Picture]:
    """Return the pictures that rows of one benchmark give, those of which some line has two points."""
    for column, make in PICTURES.items():
        if column in rows[0]:
            return [picture for picture in make(rows) if picture.is_worth_drawing]
    raise ValueError(f"expected rows of attention, generate or memory. Got the columns {list(rows[0])}.")


def add_plots_option(parser: argparse.ArgumentParser) -> None:
    """Add `--plots`."""
    parser.add_argument("--plots", action="store_true", help="draw pictures beside the results; needs matplotlib")


def require_matplotlib(parser: argparse.ArgumentParser, wanted: bool = True) -> None:
    """End with a message if pictures are wanted and there is no matplotlib, before anything is measured."""
    if wanted and find_spec("matplotlib") is None:
        parser.error("pictures need matplotlib: pip install 'ottfx[plots]'")


def draw(files: Sequence[Path], out: Path) -> list[Path]:
    """Draw what the results files of one benchmark give, as `out`-NAME.svg; return these files."""
    rows = [row for file in files for row in read_rows(file)]
    return [_draw(picture, conditions(rows), out) for picture in pictures_of(rows)]


def _draw(picture: Picture, below: str, out: Path) -> Path:
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    # Text as text, and the same file for the same rows.
    with style.context("tableau-colorblind10"), rc_context({"svg.fonttype": "none", "svg.hashsalt": "ottfx"}):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for label, points in picture.lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({x for points in picture.lines.values() for x, _ in points}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        axes.set(title=picture.title, xlabel=f"{picture.x}\n{below}", ylabel=picture.y)
        axes.xaxis.label.set_size(8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        file = out.with_name(f"{out.name}-{picture.name}.svg")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
    return file


def draw_if_asked(options: argparse.Namespace) -> None:
    """Draw the results that a benchmark has just written, if `--plots` says so."""
    if options.plots and not options.list:
        for file in draw([options.out.with_name(f"{options.out.name}.csv")], options.out):
            print(f"wrote {file}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures of the given files. The exit status is 1 if there was nothing to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results files (CSV) of one benchmark")
    parser.add_argument("--out", type=Path, help="pictures, without the end of their names; default: the first file's")
    options = parser.parse_args(arguments)
    require_matplotlib(parser)
    written = draw(options.files, options.out or options.files[0].with_suffix(""))
    print("\n".join(f"wrote {file}" for file in written) or "No size was measured twice: nothing to draw.")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
