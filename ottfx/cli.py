"""The command line: `ottfx demo` shows the quantized cache on a real model; `ottfx eval` measures it.

`ottfx export`, `ottfx run` and `ottfx inspect` are about compiled programs in a file (`ottfx/artifacts/commands.py`).
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ottfx.artifacts.commands import register as register_artifact_commands
from ottfx.command_output import errors_in_red, progress_bar, quiet_transformers, size_text
from ottfx.eval_command import register as register_evaluation
from ottfx.schemes import DEFAULT_SCHEME
from ottfx.versions import installed_version

if TYPE_CHECKING:
    from ottfx.demo import Comparison

app = typer.Typer(
    name="ottfx",
    help="A PyTorch compiler pass that stores the KV cache of unmodified transformers in 2 bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

DTYPES = ("bfloat16", "float16", "float32")

STAGES = {
    "full": "generating in full precision",
    "compile": "compiling",
    "quantized": "generating with a quantized cache",
}


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(installed_version("ottfx") or "not installed: running from a checkout")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Store the KV cache of unmodified transformers in 2 bits."""


@app.command()
def demo(
    bits: Annotated[
        Optional[int],  # noqa: UP045 (typer reads this at run time, on Python 3.10 too)
        typer.Option(help="Width of a code: 2, 3, 4 or 8. By default the scheme's own, 2."),
    ] = None,
    scheme: Annotated[str, typer.Option(help="How keys and values are stored: a registered scheme.")] = DEFAULT_SCHEME,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 96,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Your own prompt, instead of a question about a page of a novel."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda if there is one.")] = "",
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16 or float32, the model's and the full cache's.")
    ] = "bfloat16",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves the choice to torch.")] = 0,
) -> None:
    """Answer a prompt with SmolLM2-135M twice: in full precision, and with a quantized cache.

    The weights (93 MB) are fetched once, into the cache folder.
    """
    import torch

    from ottfx.demo import compare, default_prompt
    from ottfx.models import load_smollm2

    quiet_transformers()
    if dtype not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}. Got {dtype!r}.", param_hint="--dtype")
    if threads:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    with errors_in_red(), progress_bar(console) as progress:
        task = progress.add_task("starting", total=None)

        def tell(description: str) -> None:
            progress.update(task, description=description)

        with contextlib.redirect_stderr(io.StringIO()):  # its libraries draw progress bars of their own
            model, tokenizer = load_smollm2(getattr(torch, dtype), notify=tell)
        result = compare(
            model.to(device),
            tokenizer,
            prompt if prompt is not None else default_prompt(),
            bits=bits,
            scheme=scheme,
            max_new_tokens=max_new_tokens,
            on_stage=lambda stage: progress.reset(
                task, description=STAGES[stage], total=None if stage == "compile" else max_new_tokens
            ),
            on_token=lambda: progress.advance(task),
        )
    label = scheme if bits is None else f"{scheme}, {bits} bits"
    console.print(_render(result, label=label, where=f"{device}, {dtype}"))


def _render(result: Comparison, *, label: str, where: str) -> Group:
    numbers = Table(title=f"SmolLM2-135M-Instruct, prompt of {result.prompt_tokens} tokens, {where}")
    for heading in ("", "full precision", label):
        numbers.add_column(heading, justify="left" if not heading else "right")
    full, quantized = result.full, result.quantized
    numbers.add_row("cache", f"{size_text(result.full_bytes)} (at 16 bits)", size_text(result.quantized_bytes))
    for part, count in result.quantized_parts.items():
        if count:
            numbers.add_row(f"  {part}", "", size_text(count))
    numbers.add_row("smaller by", "", f"{result.full_bytes / result.quantized_bytes:.2f}x")
    numbers.add_row("new tokens", str(len(full.tokens)), str(len(quantized.tokens)))
    numbers.add_row("equal before the first difference", "", str(result.common_tokens))
    numbers.add_row("decode", _speed(full.tokens_per_second), _speed(quantized.tokens_per_second))
    numbers.add_row("first token", f"{full.first_token_seconds:.2f} s", f"{quantized.first_token_seconds:.2f} s")
    numbers.add_row("warm-up, with compilation", f"{full.warm_up_seconds:.1f} s", f"{quantized.warm_up_seconds:.1f} s")
    return Group(
        Panel(Text(full.text), title="full precision", title_align="left"),
        Panel(Text(quantized.text), title=label, title_align="left"),
        numbers,
    )


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f} tokens/s"


register_evaluation(app)
register_artifact_commands(app)

if __name__ == "__main__":
    app()
