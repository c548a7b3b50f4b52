"""The backend `"ott"` of `torch.compile`, found through the entry point group `torch_dynamo_backends`."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from ottfx.graph_compiler import compile_graph
from ottfx.settings import make_settings


def ott(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one graph so that its KV cache is quantized: `torch.compile(f, backend="ott", options={"bits": 2})`."""
    global _graphs
    _graphs += 1
    return compile_graph(gm, example_inputs, make_settings(options, mode=mode))


_graphs = 0


@atexit.register
def _tell_who_compiled_nothing() -> None:
    """`torch.compile(model).generate()` runs the uncompiled model: the one mistake that no call of ours can see."""
    if _graphs == 0:
        print(
            "ottfx: backend 'ott' was asked for, but no graph ever reached it. "
            "torch.compile(model, backend='ott').generate() runs the uncompiled model: use ottfx.compile(model), "
            "model.compile(backend='ott') or model.forward = torch.compile(model.forward, backend='ott').",
            file=sys.stderr,
        )
