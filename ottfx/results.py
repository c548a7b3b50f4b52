"""Results of `ottfx.evaluate`: what they hold, and how they are written as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ottfx.artifacts.atomic_file import atomic_file
from ottfx.cache_fidelity import Fidelity
from ottfx.errors import ConfigError
from ottfx.metrics import PositionMetrics
from ottfx.result_arrays import write_arrays
from ottfx.retrieval import Score
from ottfx.sqnr_table import mean_sqnr, sqnr_in_json, sqnr_table

FORMATS = (".json", ".csv", ".md")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to store the cache."""

    label: str
    options: Mapping[str, Any]
    """Keyword arguments of `ottfx.compile`."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Variant:
        """Return the variant of these options, named after them."""
        return cls(label=" ".join(f"{name}={value}" for name, value in options.items()) or "default", options=options)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a result depends on besides the variant."""

    model: str
    text_sha256: str
    """Of the whole text as given; empty if token ids were given."""
    tokens_sha256: str
    """Of the token ids that were read, as little-endian int64."""
    tokens: int
    start: int
    """First scored position."""
    prefill: int
    """Tokens of the prompt; the others were decoded one by one."""
    dtype: str
    device: str
    attention: str
    """The attention implementation of the model's config."""
    versions: str
    sources: str
    """Hash of ottfx's own files, see `ottfx.source_hash`: an edited scheme is another scheme."""
    date: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """Quality of one variant, with the conditions under which it was measured."""

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `ottfx.compile`, as they look in JSON."""
    description: str
    """The scheme's options in words, as stored at the last layer."""
    mean_kl: float
    """Mean KL(full || quantized) of the next-token distribution over the scored positions, in nat."""
    kl_low: float
    """Lower bound of the 95 % bootstrap interval of `mean_kl`."""
    kl_high: float
    """Upper bound of it."""
    kl_p99: float
    """The KL that one scored position in a hundred exceeds, in nat."""
    kl_drift: float
    """Mean KL of the last quarter of the scored positions over that of the first."""
    top1: float
    """Share of scored positions at which both put the same token first."""
    perplexity: float
    """Of the text, with the quantized cache."""
    perplexity_ratio: float
    """Perplexity with the quantized cache over perplexity in full precision."""
    bits_held: float
    """Bytes really held at the end, in bits an element of the dense cache, spare room and model dtype included."""
    bits_formula: float
    """Bits as papers count them: exact length, full precision as 16 bits. See `ottfx.metrics.formula_bits`."""
    bits_2k: float
    """`bits_formula` of the same model at 2,048 tokens: what is held once weighs more in a short cache."""
    bits_8k: float
    bits_32k: float
    quantized_layers: int
    """Layers that the scheme stores; the others are dense, and count so in all bits."""
    layers: int
    tasks: Mapping[str, Score] = field(default_factory=dict)
    """Name of a task of `ottfx.retrieval` -> samples answered exactly."""
    seconds: float
    """Wall time of prefill and decoding, compilation included. Not a benchmark of speed."""
    conditions: Conditions
    metrics: PositionMetrics = field(repr=False, compare=False)
    """The numbers of each position; in the files, `ottfx.result_arrays` keeps them."""
    fidelity: Fidelity | None = field(default=None, repr=False, compare=False)
    """What the cache gives back against a dense one, if that was asked for; kept in the same place."""

    def row(self) -> dict[str, Any]:
        """Return the numbers as one flat row, without conditions and positions; scores of tasks as "right/asked"."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in _NOT_IN_A_ROW]
        return {name: getattr(self, name) for name in names} | {name: str(score) for name, score in self.tasks.items()}


_NOT_IN_A_ROW = ("conditions", "fidelity", "metrics", "options", "tasks")


def options_in_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a variant as they come back from JSON, so that they can be compared with earlier ones."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(options), default=repr))
    return plain


def markdown_table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table, followed by their conditions."""
    tasks = list(dict.fromkeys(name for r in results for name in r.tasks))
    columns = [
        "variant", "bits (formula)", "bits (held)", "bits at 8k", "mean KL, nat", "95 % interval", "KL, 99 %",
        "last / first quarter", "top-1", "perplexity ratio", *tasks,
    ]  # fmt: skip
    with_sqnr = any(r.fidelity is not None for r in results)
    columns += ["SQNR K / V / output, dB"] if with_sqnr else []
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for r in results:
        cells = [
            r.label, f"{r.bits_formula:.2f}", f"{r.bits_held:.2f}", f"{r.bits_8k:.2f}", f"{r.mean_kl:.4f}",
            f"{r.kl_low:.4f} to {r.kl_high:.4f}", f"{r.kl_p99:.3f}",
            "" if math.isnan(r.kl_drift) else f"{r.kl_drift:.2f}", f"{r.top1:.3f}",
            f"{r.perplexity_ratio:.3f}", *(str(r.tasks.get(name, "")) for name in tasks),
        ]  # fmt: skip
        cells += [mean_sqnr(r.fidelity)] if with_sqnr else []
        lines.append("| " + " | ".join(cells) + " |")
    # Variants that ran one after the other differ in the time of day only.
    for c in dict.fromkeys(dataclasses.replace(r.conditions, date=r.conditions.date[:10]) for r in results):
        lines += [
            "",
            f"{c.model}, {c.dtype} on {c.device}, {c.attention} attention; {c.tokens} tokens, "
            f"of which {c.prefill} were read as a prompt and the others decoded one by one; "
            f"positions {c.start} to {c.tokens - 1} are scored. Text SHA-256 `{c.text_sha256[:16]}`, "
            f"tokens SHA-256 `{c.tokens_sha256[:16]}`. {c.versions}, sources `{c.sources}`. {c.date}.",
        ]
    for stored, layers in dict.fromkeys((r.quantized_layers, r.layers) for r in results):
        if stored < layers:
            lines += [
                "",
                f"{stored} of {layers} layers are stored by the schemes. The others stay dense and count with 16 bits; "
                "a sliding one counts the tokens of its window.",
            ]
    return "\n".join(lines) + "\n"


def _markdown_page(results: Sequence[Result]) -> str:
    by_layer = sqnr_table({r.label: r.fidelity for r in results if r.fidelity is not None})
    return markdown_table(results) + by_layer


def csv_table(results: Sequence[Result]) -> str:
    """Return the results as CSV, the conditions repeated in each row."""
    rows = [{**r.row(), **dataclasses.asdict(r.conditions)} for r in results]
    buffer = io.StringIO()
    # Results of several runs need not have been asked the same tasks.
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def json_text(results: Sequence[Result]) -> str:
    """Return the results as JSON: a list of objects, each with its `options` and `conditions`.

    Those whose fidelity was measured have `sqnr`: by way of filling the cache and by part, the mean of each layer's
    heads in dB. NaN and infinity become null.
    """
    rows = []
    for r in results:
        numbers = {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in r.row().items()
        }
        sqnr = {} if r.fidelity is None else {"sqnr": sqnr_in_json(r.fidelity)}
        rows.append({**numbers, **sqnr, "options": r.options, "conditions": dataclasses.asdict(r.conditions)})
    return json.dumps(rows, indent=2, allow_nan=False) + "\n"


def checked_path(path: str | Path) -> Path:
    """Return where results may go, or raise ConfigError: an unknown suffix is better found before the measuring."""
    path = Path(path)
    if path.suffix and path.suffix not in FORMATS:
        raise ConfigError(
            f"ottfx.write_results: the file must end in one of {list(FORMATS)}, or have no suffix. Got {str(path)!r}."
        )
    return path


def write_results(results: Sequence[Result], path: str | Path) -> list[Path]:
    """Write the results to one file, or to three. Each takes its name only when it is complete.

    Args:
        results: what `evaluate` returned.
        path: a file that ends in .json, .csv or .md, or a path without a suffix, which then gets all three.
            Beside JSON stands an .npz file with the numbers of each position, layer and head. Folders are made.

    Returns:
        The files written.

    Raises:
        ConfigError: another suffix.
    """
    path = checked_path(path)
    writers = {".json": json_text, ".csv": csv_table, ".md": _markdown_page}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in [path.suffix] if path.suffix else FORMATS:
        file = path.with_name(path.stem + suffix)
        if suffix == ".json":
            written.append(write_arrays(results, file.with_suffix(".npz")))
        with atomic_file(file) as unfinished:
            unfinished.write_text(writers[suffix](results), encoding="utf-8")
        written.append(file)
    return written
