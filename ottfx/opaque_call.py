"""Whether code runs as the body of an opaque op: on real tensors, with nobody tracing it.

Such code may look at lengths and skip what a trace would have to compute and discard, and call what no tracer knows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_calls = threading.local()


def in_opaque_call() -> bool:
    """Whether the caller runs inside `opaque_call`, in this thread."""
    return getattr(_calls, "on", False)


@contextmanager
def opaque_call() -> Iterator[None]:
    """Run the body of an opaque op inside the block."""
    _calls.on = True
    try:
        yield
    finally:
        _calls.on = False
