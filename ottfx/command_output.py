"""What the commands share in what they print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ottfx.errors import OttfxError


@contextlib.contextmanager
def errors_in_red() -> Iterator[None]:
    """Print an error of ottfx in red instead of a traceback, and leave with exit code 1."""
    try:
        yield
    except OttfxError as error:
        Console(stderr=True, soft_wrap=True).print(Text(str(error), style="red"))
        raise typer.Exit(1) from error


def progress_bar(console: Console | None = None) -> Progress:
    """Return the display of a long command: what it does, how far it is, how long it took. It vanishes at the end."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def quiet_transformers() -> None:
    """Keep what transformers prints of its own out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def size_text(count: float) -> str:
    """Return a number of bytes with its unit, such as `1.50 MiB`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"
