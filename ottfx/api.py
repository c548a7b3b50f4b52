"""The doors for a user's own Python: `compile` and `explain`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from ottfx.errors import ConfigError, MatchError
from ottfx.graph_compiler import compile_graph
from ottfx.kv_tensor import KVTensor
from ottfx.report import Report
from ottfx.schemes import DEFAULT_SCHEME
from ottfx.schemes.base import SchemeConfig
from ottfx.settings import Settings, make_settings

Model = TypeVar("Model", bound=nn.Module)

MOST_GRAPHS = 32
"""Graphs of one model before torch gives up and runs it uncompiled. Its own limit, 8, is less than a model with sliding
layers takes: prompt, chunk and single token, each with windows that are empty, filling, full, and becoming full."""


def compile(
    model: Model,
    bits: int | None = None,
    *,
    scheme: str | SchemeConfig = DEFAULT_SCHEME,
    mode: str | None = None,
    dynamic: bool | None = True,
    fullgraph: bool = False,
    lower: str = "inductor",
    **scheme_options: Any,
) -> Model:
    """Compile a model in place so that its KV cache is stored in a few bits an element.

    Works on any module whose forward takes and returns keys and values, such as a transformers decoder with its stock
    `DynamicCache`; `model.generate(...)` is then used as before. Compiling again replaces the former call.

    Args:
        model: the module to compile; it is changed in place.
        bits: width of a code, 2 (the default), 3, 4 or 8; or leave it to `scheme`, when that is a config.
        scheme: name of a scheme (`ott+`, `ott`, `kivi`, `none`, ...) or its config.
        mode: a mode of `torch.compile`. `reduce-overhead` and `max-autotune` replay decode steps as CUDA graphs; then
            one call at a time may run, and the model is not checked for changes: compile it again after replacing or
            adding modules or parameters. On a CPU they record nothing.
        dynamic: as in `torch.compile`. True compiles one graph for all lengths; None one for the first length of a
            prompt, which is a little faster, and one for all others when a second length comes.
        fullgraph: as in `torch.compile`.
        lower: `inductor`, or `eager` to run the rewritten graph node by node.
        **scheme_options: options of the scheme, such as `group_size` or `residual_length`.

    Returns:
        `model` itself.

    Raises:
        ConfigError: an option that does not exist, or a value that cannot work; the valid ones are named.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"ottfx.compile: model must be a torch.nn.Module. Got {type(model).__name__}. "
            "For a function use torch.compile(function, backend='ott')."
        )
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise ConfigError(
            "ottfx.compile: model is already the result of torch.compile, whose .generate() runs the uncompiled model. "
            "Pass the original module."
        )
    options = {"scheme": scheme, "lower": lower, **({} if bits is None else {"bits": bits}), **scheme_options}
    settings = make_settings(options, mode=mode, where="compile")
    compiled = _compile_call(model, settings, dynamic=dynamic, fullgraph=fullgraph)
    model._compiled_call_impl = compiled  # type: ignore[assignment]
    return model


def explain(
    model: nn.Module,
    example: Mapping[str, Any] | Sequence[Any],
    bits: int | None = None,
    *,
    scheme: str | SchemeConfig = DEFAULT_SCHEME,
    next_example: Callable[[Any], Mapping[str, Any] | Sequence[Any]] | None = None,
    **scheme_options: Any,
) -> Report:
    """Run a model once through the pass and report every attention site, without changing the model.

    Args:
        model: the module, compiled or not.
        example: keyword arguments (a mapping) or positional arguments of one forward call, the prompt.
        bits: as in `compile`.
        scheme: as in `compile`.
        next_example: from the prompt's result, the arguments of a decode step. By default the last token again with the
            returned `past_key_values`, when there are any.
        **scheme_options: as in `compile`.

    Returns:
        A `Report`; `print` it.

    Raises:
        MatchError: the model ran, but no graph of it reached the pass.
    """
    options = {"scheme": scheme, "lower": "eager", **({} if bits is None else {"bits": bits}), **scheme_options}
    settings = make_settings(options, where="explain")
    report = Report()
    settings.on_graph = report.add_graph
    call = _compile_call(model, settings, dynamic=True, fullgraph=False)
    with torch.no_grad():
        result = _call(call, example)
        step = _next_step(example, result) if next_example is None else next_example(result)
        if step is not None:
            _call(call, step)
    if not report.graphs:
        raise MatchError(
            f"ottfx.explain: {type(model).__name__} ran, but no graph of it was captured. "
            "Check that its forward is not excluded from torch.compile."
        )
    return report


def _compile_call(model: nn.Module, settings: Settings, *, dynamic: bool | None, fullgraph: bool) -> Callable[..., Any]:
    options: dict[str, Any] = {"guard_filter_fn": _worth_checking} if settings.records_steps else {}

    # Without these checks nothing else would notice that the model changed between training and evaluation.
    @functools.cache
    def compiled(training: bool) -> Callable[..., Any]:
        def backend(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
            return compile_graph(gm, example_inputs, settings)

        return torch.compile(
            model._call_impl, backend=backend, dynamic=dynamic, fullgraph=fullgraph, options=options or None
        )

    # With dynamic shapes every Python float would become a graph input, and every graph be compiled twice.
    @torch._dynamo.config.patch(
        specialize_float=True, recompile_limit=max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    )
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(model.training)(*args, **kwargs)

    if not settings.records_steps:
        return call

    def launch_and_call(*args: Any, **kwargs: Any) -> Any:
        settings.launch_ahead.open(args, kwargs)
        try:
            return call(*args, **kwargs)
        finally:
            settings.launch_ahead.close()

    return launch_and_call


def _worth_checking(guards: Sequence[Any]) -> Sequence[bool]:
    """Say which guards stay where steps are replayed: checking all of them takes longer than launching a step.

    Those of modules and parameters go: the caller is told that the model is not checked. Those inside a `KVTensor` go
    as its own imply them: its class says that there is an anchor, which has its batch, heads, dtype and device.
    """
    keep = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    handles = [guard.name for guard in guards if isinstance(guard.value, KVTensor)]
    inside = {f"{handle}.{member}" for handle in handles for member in ("anchor", "__tensor_flatten__()[0]")}
    return [kept and guard.name not in inside for kept, guard in zip(keep, guards, strict=True)]


def _call(call: Callable[..., Any], arguments: Mapping[str, Any] | Sequence[Any]) -> Any:
    return call(**arguments) if isinstance(arguments, Mapping) else call(*arguments)


def _next_step(example: Mapping[str, Any] | Sequence[Any], result: Any) -> Mapping[str, Any] | None:
    past = getattr(result, "past_key_values", None)
    if past is None or not isinstance(example, Mapping) or "input_ids" not in example:
        return None
    step = {"input_ids": example["input_ids"][:, -1:], "past_key_values": past}
    mask = example.get("attention_mask")
    if mask is not None:
        step["attention_mask"] = torch.cat([mask, mask[:, -1:]], dim=1)
    return step
