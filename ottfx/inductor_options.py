"""What Inductor must be told for a rewritten graph, by every door that lowers one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Moving calls towards their users would put attention behind the append that changes what it reads, and the append
# would then have to work on a copy of the cache.
REWRITTEN_GRAPH = {"reorder_for_locality": False}
"""Inductor options for a graph that appends to a cache."""


def can_see_through_cpu_ops() -> bool:
    """Whether Inductor's C++ of a scheme's ops is right in this version of torch."""
    # Fusing loops of different ranges drops the order of a read and a later write (pytorch/pytorch#177816):
    # a token is then packed after the ring row that holds it was overwritten.
    return torch.__version__ >= "2.12"


def workarounds(example_inputs: Iterable[Any]) -> dict[str, Any]:
    """Return the Inductor options that any graph with these inputs needs in this version of torch."""
    # Before torch 2.13, C++ may check an index above the line that computes it, and does not build: the padding mask of
    # transformers' decode graph does so (pytorch/pytorch#187335). Without the checks a token id that is out of range
    # raises no error in compiled CPU code.
    on_cpu = all(x.device.type == "cpu" for x in example_inputs if isinstance(x, Tensor))
    return {"assert_indirect_indexing": False} if on_cpu and torch.__version__ < "2.13" else {}
