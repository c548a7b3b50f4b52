"""What a door asks of the compiler, read from keyword options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ottfx.errors import ConfigError
from ottfx.inductor_options import can_see_through_cpu_ops
from ottfx.launch_ahead import LaunchAhead
from ottfx.recorders import RecordingPool
from ottfx.registry import make_config
from ottfx.schemes import DEFAULT_SCHEME
from ottfx.schemes.base import SchemeConfig

if TYPE_CHECKING:
    from ottfx.pipeline import RewriteResult

Lowering = Literal["inductor", "eager"]
LOWERINGS = get_args(Lowering)
MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
RECORDING_MODES = ("reduce-overhead", "max-autotune")


@dataclass(kw_only=True)
class Settings:
    """Options of one compiled model."""

    config: SchemeConfig
    lower: Lowering = "inductor"
    """`eager` runs the rewritten graph node by node: for debugging and tests."""
    inline_cpu_ops: bool = False
    """On the CPU, let Inductor make C++ of the scheme's ops instead of calling them; compiling takes far longer.
    Needs torch 2.12."""
    inductor_options: dict[str, Any] = field(default_factory=dict)
    records_steps: bool = False
    """Record decode steps as CUDA graphs. Without effect on a CPU."""
    recording_pool: RecordingPool = field(default_factory=RecordingPool)
    launch_ahead: LaunchAhead = field(default_factory=LaunchAhead)
    on_graph: Callable[[RewriteResult], None] | None = None
    """Called with what happened to each graph, before it is lowered."""
    told: set[str] = field(default_factory=set)
    """Reasons that were logged already."""

    def is_news(self, reason: str) -> bool:
        """Whether a reason has not been asked for before: each is logged once for a compiled model."""
        known = reason in self.told
        self.told.add(reason)
        return not known


def make_settings(
    options: Mapping[str, Any] | None = None, *, mode: str | None = None, where: str = "backend='ott'"
) -> Settings:
    """Read what `torch.compile` hands to a backend.

    Args:
        options: `bits`, `scheme`, `lower`, and any option of the scheme.
        mode: a mode of `torch.compile`. `torch.compile` takes either a mode or options, so `options` may have it as
            well.
        where: how errors name the caller.

    Raises:
        ConfigError: an option or mode that does not exist, or a value that cannot work.
    """
    remaining = dict(options or {})
    mode = remaining.pop("mode", mode)
    if mode not in MODES:
        raise ConfigError(f"ottfx: {where}: mode must be one of {list(MODES)}. Got mode={mode!r}.")
    lower = remaining.pop("lower", "inductor")
    if lower not in LOWERINGS:
        raise ConfigError(f"ottfx: {where}: lower must be one of {list(LOWERINGS)}. Got lower={lower!r}.")
    inline_cpu_ops = bool(remaining.pop("inline_cpu_ops", False))
    if inline_cpu_ops and not can_see_through_cpu_ops():
        raise ConfigError(
            f"ottfx: {where}: inline_cpu_ops must be False with torch {torch.__version__}, whose Inductor may write to "
            "the cache before it reads it. Got inline_cpu_ops=True. Leave it out, or use torch 2.12 or newer."
        )
    scheme = remaining.pop("scheme", DEFAULT_SCHEME)
    bits = remaining.pop("bits", None)
    config = make_config(scheme, bits, **remaining)
    inductor_options: dict[str, Any] = {}
    if mode not in (None, "default"):
        from torch._inductor import list_mode_options

        inductor_options = dict(list_mode_options(mode))
        # Inductor's own CUDA graphs would copy the cache and keep its addresses alive; `StepGraph` records instead.
        inductor_options.pop("triton.cudagraphs", None)
    return Settings(
        config=config,
        lower=lower,
        inline_cpu_ops=inline_cpu_ops,
        inductor_options=inductor_options,
        records_steps=mode in RECORDING_MODES,
    )
