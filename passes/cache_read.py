"""Walk from an operand of attention back to the cache it reads: `CacheRead`, a refusal in words, or nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from ottfx.passes.graph_utils import (
    dtype_of,
    graph_outputs,
    is_empty,
    node_value,
    same_shape,
    same_size,
    shape_of,
    short_target,
    static_int,
)
from ottfx.passes.spellings import (
    ATTENTION,
    CAT,
    EXPAND,
    GETITEM,
    METADATA_CHECK,
    REPEAT,
    REPEAT_INTERLEAVE,
    RESHAPE,
    STATIC_WRITE,
    UNSQUEEZE,
    is_guard_call,
    is_idle_query,
    is_length_slice,
    is_no_op,
    is_size_query,
    is_written,
    new_axis_of_index,
)

SLIDING = "sliding window layer stays in full precision"
STATIC_CACHE = (
    "static cache: new tokens are written into a buffer of fixed size, ottfx needs a cache that grows by cat; "
    "use a dynamic cache"
)
_WRONG_AXIS = "the cache grows along axis {}, only axis 2 of [batch, heads, length, head_dim] is supported"


@dataclass(kw_only=True)
class CacheRead:
    """One half (keys or values) of a cache that an attention reads."""

    path: list[Node]
    """Nodes between the attention operand and `full`, nearest to the attention first; may be empty."""
    full: Node
    """Past and new tokens [batch, num_kv_heads, kv_len, head_dim]."""
    past: Node | None
    new: Node
    """New tokens [batch, num_kv_heads, q_len, head_dim]."""


class CacheReader:
    """Answers what each attention operand of one graph reads. Remembers which caches were explained."""

    def __init__(self, graph: Graph) -> None:
        self.explained: set[Node] = set()
        """Every cache (a `cat`, or whatever the graph returns) that an attention was traced to."""
        self._whole: set[Node] = set()
        self._sliced: set[Node] = set()
        for node in graph_outputs(graph):
            sliced = False
            while isinstance(node, Node):
                (self._sliced if sliced else self._whole).add(node)
                sliced = sliced or is_length_slice(node)
                if not node.args or not (is_no_op(node) or is_length_slice(node)):
                    break
                node = node.args[0]

    def read(self, operand: Node, attention: Node) -> CacheRead | str | None:
        """Say which cache an operand reads.

        Args:
            operand: key or value argument of `attention`.
            attention: the attention node.

        Returns:
            The cache, a reason why it cannot be replaced, or None if there is no cache.
        """
        path, root = _undo_repeat(operand)
        if root in CAT and self._is_cache_cat(root):
            self.explained.add(root)
            return self._read_cat(path, root, attention)
        if self._writes_static_cache(root):
            self.explained.add(root)
            return STATIC_CACHE
        source = root.args[0] if is_length_slice(root) else None
        if isinstance(source, Node) and source in CAT and self._is_cache_cat(source):
            self.explained.add(source)
            return SLIDING if source in self._sliced else "attention reads only a slice of the cache"
        if root.op != "placeholder" and root in self._sliced | self._whole:
            self.explained.add(root)
            if root not in self._whole:
                return SLIDING
            return self._checked(CacheRead(path=path, full=root, past=None, new=root), attention)
        return self._look_behind(root)

    def returned_caches(self, graph: Graph) -> list[Node]:
        """Every `cat` of stored and new tokens that the graph returns, in graph order."""
        return [node for node in graph.nodes if node in CAT and self._is_cache_cat(node)]

    def _is_cache_cat(self, cat: Node) -> bool:
        if cat not in self._whole | self._sliced or len(shape_of(cat) or ()) != 4:
            return False
        parts = CAT.operand(cat, "tensors")
        return any(isinstance(part, Node) and (is_empty(part) or _is_stored(part)) for part in parts)

    def _read_cat(self, path: list[Node], cat: Node, attention: Node) -> CacheRead | str:
        parts, dim = CAT.operand(cat, "tensors"), CAT.operand(cat, "dim", 0)
        if dim not in (2, -2):
            return _WRONG_AXIS.format(dim)
        if len(parts) != 2:
            return f"the cache is a cat of {len(parts)} parts, only [stored, new] is supported"
        if cat not in self._whole:
            return SLIDING
        past, new = parts
        if not is_empty(past) and not _is_stored(past):
            return f"the stored tokens are not an input of the graph, they come from {short_target(past)!r}"
        if isinstance(node_value(past), torch.nn.Parameter):
            return "the stored tokens are a parameter of the model"
        read = CacheRead(path=path, full=cat, past=None if is_empty(past) else past, new=new)
        if len(shape_of(new) or ()) != 4:
            return "the new tokens are not 4-D [batch, heads, length, head_dim]"
        if is_written(new):
            return "the new tokens are written in place after they were stored"
        if not (dtype_of(cat) == dtype_of(new) and dtype_of(past) == dtype_of(new)):
            return f"stored tokens are {dtype_of(past)} and new ones {dtype_of(new)}"
        return self._checked(read, attention)

    def _checked(self, read: CacheRead, attention: Node) -> CacheRead | str:
        """The read itself, or who else looks at the tensors that would no longer exist."""
        allowed = {attention, *read.path}
        for watched in (read.full, *read.path) if read.full is not read.new else tuple(read.path):
            user = self._stranger(watched, allowed)
            if user is not None:
                return f"the cache is also read by {short_target(user)!r} ({user.name}), not only by this attention"
        if read.past is not None:
            user = self._stranger(read.past, {read.full})
            if user is not None:
                return f"the stored tokens are also read by {short_target(user)!r} ({user.name})"
        return read

    def _stranger(self, node: Node, allowed: set[Node]) -> Node | None:
        """A user of the tensor that needs its elements, apart from those allowed and the graph's result."""
        for user in node.users:
            if user in allowed or user.op == "output" or user in METADATA_CHECK or is_guard_call(user):
                continue
            if is_idle_query(user) or is_size_query(user):
                continue
            if is_no_op(user) and user in self._whole and self._stranger(user, allowed) is None:
                continue
            return user
        return None

    def _look_behind(self, root: Node) -> str | None:
        """Why an operand that is no cache itself was computed from one, or None if no cache is behind it."""
        seen, stack = {root}, [root]
        while stack:
            node = stack.pop()
            if node in CAT and self._is_cache_cat(node):
                self.explained.add(node)
                dim = CAT.operand(node, "dim", 0)
                if dim not in (2, -2):
                    return _WRONG_AXIS.format(dim)
                return f"attention does not read the cache itself, it reads {short_target(root)!r} computed from it"
            if self._writes_static_cache(node):
                return STATIC_CACHE
            if node not in ATTENTION:
                new = [source for source in node.all_input_nodes if source not in seen]
                seen.update(new)
                stack.extend(new)
        return None

    def _writes_static_cache(self, node: Node) -> bool:
        if len(shape_of(node) or ()) != 4:
            return False
        if node in STATIC_WRITE:
            return True
        written = any(user in STATIC_WRITE and user.args and user.args[0] is node for user in node.users)
        return node.op in ("placeholder", "get_attr") and written


def _is_stored(node: Node) -> bool:
    return node.op == "placeholder" and len(shape_of(node) or ()) == 4


def _undo_repeat(operand: Node) -> tuple[list[Node], Node]:
    """Walk up through copies and through the repetition of kv heads for grouped queries.

    Returns:
        The nodes passed, nearest to the operand first, and the first node that is neither.
    """
    path: list[Node] = []
    node = operand
    while True:
        step = [node] if is_no_op(node) else _repeat_step(node)
        if step is None:
            return path, node
        path += step
        node = step[-1].args[0]  # type: ignore[assignment]


def _repeat_step(node: Node) -> list[Node] | None:
    """The nodes of one repetition `head h -> heads h * n .. h * n + n - 1`, last first, or None."""
    if not node.args or not isinstance(node.args[0], Node):
        return None
    before, after = shape_of(node.args[0]), shape_of(node)
    if before is None or after is None or len(after) != 4:
        return None
    if len(before) == 4:
        others_kept = all(same_size(before[axis], after[axis]) for axis in (0, 2, 3))
        one_head = static_int(before[1]) == 1 and static_int(after[1]) is not None
        if node in REPEAT_INTERLEAVE:
            dim = REPEAT_INTERLEAVE.operand(node, "dim")
            repeats = static_int(REPEAT_INTERLEAVE.operand(node, "repeats"))
            return [node] if dim in (1, -3) and repeats is not None else None
        return [node] if (node in EXPAND or node in REPEAT) and one_head and others_kept else None
    if node not in RESHAPE or len(before) != 5:
        return None
    return _five_axis_repeat(node)


def _five_axis_repeat(reshape: Node) -> list[Node] | None:
    """`x[:, :, None]`, its expansion on axis 2, and the reshape that joins axes 1 and 2."""
    grouped, joined = shape_of(reshape.args[0]), shape_of(reshape)
    assert grouped is not None and joined is not None
    if not same_size(joined[1], grouped[1] * grouped[2]):
        return None
    if not all(same_size(grouped[i], joined[j]) for i, j in ((0, 0), (3, 2), (4, 3))):
        return None
    path, node = [reshape], reshape.args[0]
    while isinstance(node, Node) and node.args and isinstance(node.args[0], Node):
        path.append(node)
        source = node.args[0]
        before, after = shape_of(source), shape_of(node)
        if before is None or after is None:
            return None
        if len(before) == 4:
            added = UNSQUEEZE.operand(node, "dim") if node in UNSQUEEZE else None
            added = new_axis_of_index(node) if node in GETITEM else added
            return path if added in (2, -3) else None
        expands = (node in EXPAND or node in REPEAT) and static_int(before[2]) == 1
        expands = expands and same_shape(before[:2] + before[3:], after[:2] + after[3:])
        if not (is_no_op(node) or expands):
            return None
        node = source
    return None
