"""The command `ottfx eval`: measure the quality of quantized caches on a real model and text."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ottfx.command_output import errors_in_red
from ottfx.errors import ArtifactError, ConfigError

# torch takes seconds to import: functions that need it do so themselves, so that `--help` answers at once.
if TYPE_CHECKING:
    from ottfx.results import Result, Variant


def register(app: typer.Typer) -> None:
    """Add the command `eval` to a typer application."""
    app.command("eval")(eval_command)


def eval_command(
    schemes: Annotated[str, typer.Option(help="Comma-separated schemes, each with its defaults.")] = "none,kivi,ott",
    bits: Annotated[str, typer.Option(help="Comma-separated widths of a code, for the schemes that have codes.")] = "2",
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="'NAME=VALUE ...': also each scheme that has these options, with these values; may be repeated."
        ),
    ] = None,
    study: Annotated[bool, typer.Option("--study", help="The study's variants, beside what it found.")] = False,
    model: Annotated[
        str, typer.Option(help="smollm2, gemma3-270m or random-qwen2, or a model folder or hub name.")
    ] = "smollm2",
    text: Annotated[str, typer.Option(help="A UTF-8 text file. Default: Persuasion.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are read.")] = 2048,
    start: Annotated[int, typer.Option(help="First scored position.")] = 256,
    tasks: Annotated[str, typer.Option(help="Comma-separated: lines, copy, passkey-512, passkey-1024, or all.")] = "",
    samples: Annotated[int, typer.Option(help="Samples of each task.")] = 16,
    sqnr: Annotated[bool, typer.Option("--sqnr", help="Also SQNR by layer and head: K, V, attention output.")] = False,
    plots: Annotated[bool, typer.Option("--plots", help="PNG files beside the results; turns on --sqnr.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16. Default: float32 on cpu.")] = "",
    lower: Annotated[str, typer.Option(help="inductor, or eager: slower steps, but nothing to compile.")] = "inductor",
    out: Annotated[str, typer.Option(help="A .json, .csv or .md file; without suffix all three.")] = "results/quality",
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the results in that file, do not continue.")] = False,
) -> None:
    """Compare quantized caches with full precision: mean KL, top-1 agreement, perplexity, effective bits.

    Continues the results in the file (.json, or without suffix): what is there and was measured under the same
    conditions stays, what is missing is measured and added. Other conditions are refused, unless `--fresh` replaces
    the file.
    """
    import torch

    from ottfx.results import markdown_table, write_results
    from ottfx.study import study_table, study_variants

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    with errors_in_red():
        if plots:
            from ottfx.plots import check_plots, draw_plots

            check_plots()
        variants = study_variants() if study else default_variants(schemes.split(","), bits.split(","), vary or ())
        if lower != "inductor":
            variants = [replace(variant, options={**variant.options, "lower": lower}) for variant in variants]
        elif device.startswith("cuda"):
            # A long text is many small steps, and launching them would take most of the time.
            recorded = {"mode": "reduce-overhead"}
            variants = [replace(variant, options={**recorded, **variant.options}) for variant in variants]
        results = run_evaluation(
            variants,
            model,
            device,
            dtype,
            text,
            tokens,
            start,
            out,
            task_names(tasks),
            samples,
            sqnr=sqnr or plots,
            fresh=fresh,
        )
        typer.echo(markdown_table(results))
        if study:
            typer.echo(study_table(results))
        for file in [*write_results(results, out), *(draw_plots(results, out) if plots else [])]:
            typer.echo(f"wrote {file}")


def default_variants(
    schemes: Sequence[str], bits: Sequence[str] = ("2",), changes: Sequence[str] = ()
) -> list[Variant]:
    """Return a variant for each scheme and width, with the scheme's own defaults; one for a scheme without widths.

    Each is followed by one for each of `changes`, such as "group_size=64 residual_length=64", whose options it has.

    Raises:
        ConfigError: no name is left, a name is not registered, a width is no whole number, or no scheme has an option.
    """
    import dataclasses

    from ottfx.registry import get_scheme
    from ottfx.results import Variant

    names = list(dict.fromkeys(name.strip() for name in schemes if name.strip()))
    if not names:
        raise ConfigError("ottfx eval: expected at least one scheme. Got none. Try --schemes none,kivi,ott.")
    widths = list(dict.fromkeys(width.strip() for width in bits if width.strip()))
    if not widths or not all(width.isdecimal() for width in widths):
        raise ConfigError(f"ottfx eval: --bits must be whole numbers, such as 2,3,4. Got {','.join(bits)!r}.")
    variants = []
    known = {name: {field.name for field in dataclasses.fields(get_scheme(name).config_class)} for name in names}
    changed = [dict(option_value(part) for part in text.split()) for text in changes]
    for options in changed:
        if not any(fields.issuperset(options) for fields in known.values()):
            raise ConfigError(f"ottfx eval: --vary needs options of one of {names}. Got {list(options)!r}.")
    for name in names:
        plain = [Variant(label=name, options={"scheme": name})]
        if "bits" in known[name]:
            plain = [
                Variant(label=f"{name} {width}-bit", options={"scheme": name, "bits": int(width)}) for width in widths
            ]
        for variant in plain:
            variants.append(variant)
            variants += [
                Variant(label=f"{variant.label} {text}", options={**variant.options, **options})
                for text, options in zip(changes, changed, strict=True)
                if known[name].issuperset(options)
            ]
    return variants


TRUTH = {"true": True, "false": False}


def option_value(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as Python writes it, `true` and `false` in any case, or else as text.

    Raises:
        ConfigError: there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"ottfx: an option is given as NAME=VALUE. Got {text!r}.")
    if value.lower() in TRUTH:
        return name, TRUTH[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def task_names(tasks: str) -> list[str]:
    """Return the tasks of a comma-separated list; all of them for "all".

    Raises:
        ConfigError: an unknown task.
    """
    from ottfx.retrieval import TASKS

    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if names == ["all"]:
        return list(TASKS)
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(f"ottfx eval: --tasks must be among {[*TASKS, 'all']}. Got {unknown!r}.")
    return names


def run_evaluation(
    variants: Sequence[Variant],
    model: str,
    device: str,
    dtype: str,
    text: str,
    tokens: int,
    start: int,
    out: str,
    tasks: Sequence[str] = (),
    samples: int = 16,
    *,
    sqnr: bool = False,
    fresh: bool = True,
) -> list[Result]:
    """Load a model and measure `variants` on it, with a progress bar for each.

    Args:
        variants: what to measure.
        model: one of `ottfx.models.TITLES`, or what `from_pretrained` takes.
        device: a torch device.
        dtype: name of a torch floating-point dtype.
        text: path of a UTF-8 file; empty for the bundled text.
        tokens: tokens that are read.
        start: first scored position.
        out: where the results go, as for `write_results`; written anew after each variant.
        tasks: names of tasks that are asked as well, see `ottfx.retrieval`.
        samples: samples of each task.
        sqnr: as for `ottfx.evaluate`.
        fresh: replace what `out` holds. Otherwise it is continued, if it is or has a JSON file.

    Returns:
        The results that `out` then holds: those kept, and those measured now.

    Raises:
        ArtifactError: `out` holds something else.
        ConfigError: `out` holds results of other conditions, or has an unknown suffix; or as `load_model`,
            `ottfx.retrieval.make_samples` and `ottfx.evaluate`.
    """
    from rich import progress as bars

    from ottfx.earlier_results import read_results
    from ottfx.evaluation import default_text, evaluate
    from ottfx.models import TITLES
    from ottfx.results import checked_path, write_results
    from ottfx.retrieval import make_samples

    continued = checked_path(out).suffix in ("", ".json") and not fresh
    record = {result.label: result for result in (read_results(out) if continued else [])}
    language_model, tokenizer = load_model(model, dtype)
    language_model = language_model.to(device)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
    with bars.Progress(*columns, bars.TimeElapsedColumn(), bars.TimeRemainingColumn()) as progress:
        rows: dict[str, bars.TaskID] = {}

        def on_step(label: str, done: int, total: int) -> None:
            if label not in rows:
                rows[label] = progress.add_task(label)
            progress.update(rows[label], completed=done, total=total)

        measured = []

        def on_result(result: Result) -> None:
            measured.append(result.label)
            record[result.label] = result
            write_results(list(record.values()), out)
            progress.console.print(f"{result.label}: mean KL {result.mean_kl:.4f} nat, {result.seconds:.0f} s")

        evaluate(
            language_model,
            tokenizer,
            variants,
            text=Path(text).read_text(encoding="utf-8") if text else None,
            num_tokens=tokens,
            start=start,
            tasks={task: make_samples(task, tokenizer, default_text(), samples) for task in tasks},
            model_name=TITLES.get(model, model),
            sqnr=sqnr,
            earlier=list(record.values()),
            on_step=on_step,
            on_result=on_result,
        )
    if kept := [label for label in record if label not in measured]:
        typer.echo(f"kept from {out}: {', '.join(kept)}")
    return list(record.values())


def load_model(model: str, dtype: str) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: one of `ottfx.models.TITLES`, or a model folder or hub name that `from_pretrained` takes.
        dtype: name of a torch floating-point dtype, for the weights.

    Raises:
        ConfigError: `dtype` is not the name of a floating-point dtype.
        ArtifactError: no model or no tokenizer could be loaded.
    """
    import torch

    from ottfx.models import TITLES, load_known

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"ottfx: dtype must be float32, float16 or bfloat16. Got {dtype!r}.")
    if model in TITLES:
        return load_known(model, kind, notify=typer.echo)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=kind), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"ottfx: expected one of {list(TITLES)}, or a folder or hub name of a model and its tokenizer. "
            f"Got {model!r}: {error}"
        ) from error
