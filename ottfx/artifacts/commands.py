"""The commands `ottfx export`, `ottfx run` and `ottfx inspect`: compiled programs in a file."""

from __future__ import annotations

import ast
import contextlib
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from ottfx.command_output import errors_in_red, progress_bar, quiet_transformers, size_text
from ottfx.errors import ArtifactError, ConfigError
from ottfx.schemes import DEFAULT_SCHEME

# torch and transformers take seconds to import: functions that need them do so themselves.
if TYPE_CHECKING:
    from torch import Tensor

    from ottfx.artifacts.program_cache import ProgramCache

COMMAND_OPTIONS = ("bits", "scheme", "weights", "format", "tokenizer", "on_stage")
"""Arguments of `ottfx.export` that are not options of a scheme."""


def register(app: typer.Typer) -> None:
    """Add the commands `export`, `run` and `inspect` to a typer application."""
    app.command("export")(export_command)
    app.command("run")(run_command)
    app.command("inspect")(inspect_command)


def export_command(
    model: Annotated[str, typer.Argument(help="smollm2, or a model folder or hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("model.pt2"),
    bits: Annotated[
        Optional[int],  # noqa: UP045 (typer reads this at run time, on Python 3.10 too)
        typer.Option(help="Width of a code: 2, 3, 4 or 8. By default the scheme's own, 2."),
    ] = None,
    scheme: Annotated[str, typer.Option(help="How keys and values are stored: a registered scheme.")] = DEFAULT_SCHEME,
    option: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Another option of the scheme, as name=value. May be repeated."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, the weights' own.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where it will run: cpu or cuda. Default: cuda if there is one.")] = "",
    weights: Annotated[str, typer.Option(help="inside the file, or external: in another one beside it.")] = "inside",
    format: Annotated[
        str, typer.Option(help="aoti: compiled for this kind of machine. exported: a folder of torch.export programs.")
    ] = "aoti",
) -> None:
    """Compile a model with its quantized cache ahead of time, into one file."""
    import torch

    import ottfx
    from ottfx.artifacts.archive import read_archive
    from ottfx.artifacts.report import bytes_per_token
    from ottfx.eval_command import load_model

    with errors_in_red():
        options = parse_options(option or [])
        start = time.perf_counter()
        with progress_bar() as progress:
            task = progress.add_task("load the model", total=None)
            quiet_transformers()
            with contextlib.redirect_stderr(io.StringIO()):  # its libraries draw progress bars of their own
                language_model, tokenizer = load_model(model, dtype)
            ottfx.export(
                language_model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
                output,
                bits=bits,
                scheme=scheme,
                weights=weights,
                format=format,
                tokenizer=tokenizer,
                on_stage=lambda name, index, total: progress.update(
                    task, description=name, completed=index, total=total
                ),
                **options,
            )
        seconds = time.perf_counter() - start
        lines = [f"wrote {output} in {seconds:.1f} s: {size_text(_bytes_on_disk(output))}"]
        if format == "aoti":
            manifest = read_archive(output, verify=False).manifest
            if manifest.weights.location == "external":
                lines[0] += f", and {size_text(manifest.weights.bytes)} of weights in {manifest.weights.file}"
            memory = (f"{count:.1f} at {length // 1024}k" for length, count in bytes_per_token(manifest).items())
            lines.append(f"cache, bytes per token: {', '.join(memory)}")
    Console(soft_wrap=True, markup=False, highlight=False).print("\n".join(lines))


def run_command(
    path: Annotated[Path, typer.Argument(help="A file written by ottfx export.")],
    prompt: Annotated[str, typer.Option(help="What to answer; with --cache, what follows the stored text.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 256,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="Sample with this temperature. 0: greedy."),
    ] = None,
    top_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this probability."),
    ] = None,
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Sample from so many likeliest tokens."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Sample, the same in every run. Without a sampling option: greedy."),
    ] = None,
    cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Start from the text of this saved cache."),
    ] = None,
    save_cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Save the cache of the whole text, with the answer, to this file."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt without the tokenizer's chat template.")] = False,
) -> None:
    """Answer a prompt with a compiled model, and print the text as it comes."""
    import torch

    import ottfx

    quiet_transformers()
    with errors_in_red():
        start = time.perf_counter()
        program = ottfx.load(path)
        load_seconds = time.perf_counter() - start
        if program.tokenizer is None:
            raise ArtifactError(
                f"ottfx run: {str(path)!r} must hold a tokenizer. Got none. Export it with one, or use ottfx.load."
            )
        packed = program.new_cache(1) if cache is None else _stored_cache(cache, program.device)
        stored = packed.length
        ids = _token_ids(program.tokenizer, prompt, raw=raw, is_start=stored == 0)
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        sampling = {name: value for name, value in sampling.items() if value is not None}
        do_sample = temperature != 0 and (bool(sampling) or seed is not None)
        if seed is not None:
            torch.manual_seed(seed)
        clock = _Clock(program.tokenizer)
        tokens = program.generate(
            ids,
            torch.ones(1, stored + ids.shape[1], dtype=torch.int64),
            cache=packed,
            streamer=clock,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            **(sampling if do_sample else {}),
        )
        if save_cache is not None:
            if packed.length < stored + tokens.shape[1]:  # a token is stored by the step that reads it
                program.decode(tokens[:, -1:], packed)
            ottfx.save_cache(packed, save_cache)
    err = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    err.print(f"loaded in {load_seconds:.2f} s, {ids.shape[1]} tokens of prompt in {clock.first_seconds:.2f} s")
    err.print(f"{clock.count} new tokens, {clock.tokens_per_second:.1f} tokens/s")
    parts = ", ".join(f"{part} {size_text(count)}" for part, count in packed.bytes_by_part().items() if count)
    err.print(f"cache of {packed.length} tokens: {size_text(packed.nbytes)} ({parts})")


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A file written by ottfx export.")],
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as it is in the file.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of the file, and check every part.")] = False,
) -> None:
    """Say what is in a file of compiled programs, without loading them."""
    from ottfx.artifacts.archive import read_archive
    from ottfx.artifacts.report import describe

    with errors_in_red():
        manifest = read_archive(path, verify=verify).manifest
        if json:
            typer.echo(manifest.to_json(), nl=False)
            return
        Console(markup=False, highlight=False).print(describe(manifest, path.name))


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read options of a scheme as a command line gives them.

    Args:
        pairs: such as `group-size=64`, `mask_replaced=false`, `exempt_layers=0,1` or `replacement=rest`: a Python
            literal, true, false, or else text.

    Raises:
        ConfigError: one is not name=value, comes twice, or has an option of the command itself.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not (equals and name.isidentifier()) or name in options or name in COMMAND_OPTIONS:
            raise ConfigError(
                f"ottfx export: --option must be name=value, each name once, for what has no option of its own. "
                f"Got {pair!r}."
            )
        text = {"true": "True", "false": "False"}.get(text, text)
        options[name] = text
        with contextlib.suppress(ValueError, SyntaxError):
            options[name] = ast.literal_eval(text)
    return options


def _bytes_on_disk(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _stored_cache(path: Path, device: Any) -> ProgramCache:
    import ottfx
    from ottfx.artifacts.program_cache import ProgramCache

    cache = ottfx.load_cache(path, device=device)
    if not isinstance(cache, ProgramCache) or cache.batch_size != 1:
        raise ArtifactError(
            f"ottfx run: {str(path)!r} must hold the cache of one sequence of a compiled model, as --save-cache writes "
            f"it. Got {cache!r}."
        )
    return cache


def _token_ids(tokenizer: Any, prompt: str, *, raw: bool, is_start: bool) -> Tensor:
    if raw or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt", add_special_tokens=is_start)["input_ids"]
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


class _Clock:
    """A streamer that prints the new text, and notes when each token came."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import TextStreamer

        self.printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then a token at a time."""
        self.times.append(time.perf_counter())
        self.printer.put(value)

    def end(self) -> None:
        """Print what is left of the text."""
        self.printer.end()

    @property
    def count(self) -> int:
        """New tokens."""
        return len(self.times) - 1

    @property
    def first_seconds(self) -> float:
        """Time to the first new token."""
        return self.times[1] - self.times[0]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first; NaN if there is none."""
        return (self.count - 1) / (self.times[-1] - self.times[1]) if self.count > 1 else float("nan")
