"""Tables of `benchmarks.quality` and `ottfx eval`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.tables.markdown import Row, count, groups, number, table

OPTIONAL = {"bits_8k": "bits at 8k tokens", "kl_p99": "KL, 99 % of positions below", "lines": "lines found"}
"""Columns that older results files lack -> their heading."""

SMALL = 0.1
"""Values of KL below this have a digit more."""


def variants(rows: Sequence[Row]) -> str:
    """Quality of variants on one text."""
    optional = {column: title for column, title in OPTIONAL.items() if any(row.get(column) for row in rows)}
    columns = ["variant", "bits", "mean KL from full precision, nat", "95 % interval", "same first token"]
    columns += ["perplexity ratio", *optional.values()]
    parts = []
    for group in groups(rows, "model", "tokens_sha256", "dtype"):
        cells = [
            [
                row["description"] + (" (the paper's defaults)" if "paper" in row["label"] else ""),
                number(row["bits_formula"], "{:.2f}"),
                _nat(row["mean_kl"]),
                f"{_nat(row['kl_low'])} to {_nat(row['kl_high'])}",
                number(row["top1"], "{:.3f}"),
                number(row["perplexity_ratio"], "{:.3f}"),
                *(_optional(row, column) for column in optional),
            ]
            for row in group
        ]
        parts.append(f"{_title(group[0])}\n\n{table(columns, cells)}")
    return "\n\n".join(parts)


def ideas(rows: Sequence[Row]) -> str:
    """Quality of ideas beside the plain scheme, which is the first row of each model."""
    columns = ["variant", "bits", "bits at 8k tokens", "mean KL from full precision, nat", "95 % interval"]
    columns += ["difference from the first row, 95 % interval", "same first token", "perplexity ratio"]
    parts = []
    for group in groups(rows, "model", "tokens_sha256", "dtype"):
        plain = group[0]["label"]
        cells = [
            [
                row["label"].removeprefix(plain).lstrip(" ,") or plain,
                number(row["bits_formula"], "{:.2f}"),
                number(row["bits_8k"], "{:.2f}"),
                number(row["mean_kl"], "{:.4f}"),
                f"{number(row['kl_low'], '{:.4f}')} to {number(row['kl_high'], '{:.4f}')}",
                ""
                if row is group[0]
                else f"{number(row['kl_change_low'], '{:+.4f}')} to {number(row['kl_change_high'], '{:+.4f}')}",
                number(row["top1"], "{:.3f}"),
                number(row["perplexity_ratio"], "{:.3f}"),
            ]
            for row in group
        ]
        parts.append(f"{_title(group[0])}\n\n{table(columns, cells)}")
    return "\n\n".join(parts)


def _title(row: Row) -> str:
    return (
        f"{row['model']}, {row['dtype']}, {count(row['tokens'])} tokens, of which {count(row['prefill'])} "
        f"are a prompt and the others decoded one by one, positions {count(row['start'])} and later:"
    )


def _optional(row: Row, column: str) -> str:
    return row.get(column, "") if column == "lines" else number(row.get(column), "{:.2f}")


def _nat(text: str) -> str:
    cell = number(text, "{:.4f}" if text and abs(float(text)) < SMALL else "{:.3f}")
    # What rounding leaves of a difference may be a negative zero.
    return cell if not cell or float(cell) else cell.lstrip("-")


def spread(rows: Sequence[Row]) -> str:
    """One sentence: how far the mean KL of a variant moves between texts."""
    moves = []
    for group in groups([row for row in rows if float(row["mean_kl"]) > 1e-6], "label"):
        values = [float(row["mean_kl"]) for row in group]
        moves.append(max(values) / min(values) - 1)
    texts = len({row["tokens_sha256"] for row in rows})
    return f"Between these {texts} texts the mean KL of one variant moves by {min(moves):.0%} to {max(moves):.0%}."
