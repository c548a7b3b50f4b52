"""Read symbolic sizes of a captured graph from the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

Reader = Callable[[Sequence[Any]], int]


class SizeReader:
    """Turns a size of a traced tensor, an int or SymInt, into a function of the graph's run-time arguments.

    Args:
        example_inputs: what the graph was traced with, one for each placeholder: SymInts and fake tensors.
    """

    def __init__(self, example_inputs: Sequence[Any]) -> None:
        self._sources: dict[sympy.Symbol, Reader] = {}
        for index, example in enumerate(example_inputs):
            if isinstance(example, torch.SymInt):
                self._add(example, _argument(index))
        for index, example in enumerate(example_inputs):
            if isinstance(example, Tensor):
                for dim, size in enumerate(example.shape):
                    self._add(size, _dimension(index, dim))

    def _add(self, size: int | torch.SymInt, reader: Reader) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            self._sources.setdefault(size.node.expr, reader)

    def reader(self, size: int | torch.SymInt) -> Reader:
        """Return a function of the call's arguments that gives this size."""
        if not isinstance(size, torch.SymInt):
            constant = int(size)
            return lambda args: constant
        expression = size.node.expr
        if expression.is_Integer:
            constant = int(expression)
            return lambda args: constant
        if expression.is_Symbol:
            return self._sources[expression]
        symbols = sorted(expression.free_symbols, key=str)
        parts = [self._sources[symbol] for symbol in symbols]
        function = sympy.lambdify(symbols, expression, modules=[{"Max": max, "Min": min}, "math"])
        return lambda args: int(function(*[part(args) for part in parts]))


def _argument(index: int) -> Reader:
    return lambda args: args[index]


def _dimension(index: int, dim: int) -> Reader:
    return lambda args: args[index].shape[dim]
