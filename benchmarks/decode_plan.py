"""How the decode kernel is cut into programs: what `kernels/decode_plan.py` chooses, against other cuts in one run.

`python -m benchmarks.decode_plan` on a GPU; on another card than an H100 it says where the numbers of that file should
change. Case names: SHAPE/BATCHxLENGTH/PART/CUT.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch

from benchmarks.attention import QUICK_SHAPES, SHORT, WORKLOADS, Setting, attend_call
from benchmarks.runner import Case, command_line, run_cases
from benchmarks.shapes import heads_of, parse_workload
from benchmarks.timing import device_microseconds

PARTS = ("complete", "plus")
CHOSEN = "chosen"
CUTS: dict[str, Callable[[Any], Any]] = {
    CHOSEN: lambda plan: plan,
    "half the splits": lambda plan: _split(plan, max(plan.splits // 2, 1)),
    "twice the splits": lambda plan: _split(plan, plan.splits * 2),
    "window in 1": lambda plan: _cut_window(plan, 1),
    "window in 2": lambda plan: _cut_window(plan, 2),
    "window in 3": lambda plan: _cut_window(plan, 3),
}
"""Name -> from the chosen `DecodePlan` to another one."""


def _split(plan: Any, splits: int) -> Any:
    return replace(plan, splits=splits, most_parts=splits + plan.seat_parts + plan.window_parts)


def _cut_window(plan: Any, parts: int) -> Any:
    return replace(plan, window_parts=parts, most_parts=plan.splits + plan.seat_parts + parts)


class Cutting:
    """Measures cuts, and remembers the time of the chosen one."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.chosen: dict[Setting, float] = {}

    def measure(self, setting: Setting, name: str) -> dict[str, Any]:
        """Time the attention of a decode step with one cut."""
        _, call = attend_call(setting)
        with cut_by(CUTS[name], self.device) as plans:
            microseconds = device_microseconds(call, self.device)
        if name == CHOSEN:
            self.chosen[setting] = microseconds
        chosen = self.chosen.get(setting)
        row = {"us": microseconds, "over_chosen": None if chosen is None else microseconds / chosen}
        return row | ({"splits": plans[-1].splits, "window_parts": plans[-1].window_parts} if plans else {})


@contextmanager
def cut_by(change: Callable[[Any], Any], device: str) -> Iterator[list[Any]]:
    """Give the plans that were used inside the block, each changed by `change`; on a CPU there are none."""
    plans: list[Any] = []
    if device == "cpu":
        yield plans
        return
    from ottfx.kernels import affine_attend

    choose = affine_attend.decode_plan

    def choose_otherwise(**sizes: Any) -> Any:
        plans.append(change(choose(**sizes)))
        return plans[-1]

    with mock.patch.object(affine_attend, "decode_plan", choose_otherwise):
        yield plans


def plan(cutting: Cutting, tiny: bool) -> Iterator[Case]:
    """Yield all cases, the chosen cut of a setting before the others."""
    shapes, workloads = (("tiny",), ("2x256",)) if tiny else (QUICK_SHAPES, (*WORKLOADS, *SHORT, "1x4k"))
    for workload, shape, part, name in product(workloads, shapes, PARTS, CUTS):
        batch_size, length = parse_workload(workload)
        setting = Setting(
            heads=heads_of(shape),
            batch_size=batch_size,
            length=length,
            q_len=1,
            bits=2,
            group_size=128,
            part=part,
            dtype=torch.float32 if cutting.device == "cpu" else torch.bfloat16,
            device=cutting.device,
        )
        yield Case(
            labels={"shape": shape, "workload": workload, "part": part, "cut": name},
            measure=partial(cutting.measure, setting, name),
            quick=part == "plus" and workload in (workloads[0], SHORT[0]),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = command_line(__doc__, "decode_plan").parse_args(arguments)
    return run_cases(plan(Cutting(options.device), options.tiny), options)


if __name__ == "__main__":
    sys.exit(main())
