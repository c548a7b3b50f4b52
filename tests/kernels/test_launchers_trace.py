"""The launchers trace with symbolic sizes, add no guards, and mutate what the operators declare; no GPU is needed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

triton = pytest.importorskip("triton")

from torch._dynamo.source import ConstantSource  # noqa: E402
from torch._higher_order_ops import triton_kernel_wrap  # noqa: E402

from ottfx.cache_call import LENGTHS_WIDTH  # noqa: E402
from ottfx.kernel_writes import kernel_writes_remembered  # noqa: E402
from ottfx.kernels.affine_append import append  # noqa: E402
from ottfx.kernels.affine_attend import attend  # noqa: E402
from ottfx.ops import affine_append, affine_attend  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]
KV_HEADS, HEADS, HEAD_DIM, SEATS, SPILL, RING = 8, 32, 128, 3, 32, 160
KEY_STATE = ("key_codes", "key_scale", "key_zero_point", "key_residual", "residual_valid")
VALUE_STATE = ("value_codes", "value_scale", "value_zero_point", "value_residual")
POOL = ("outlier_key", "outlier_position", "outlier_value", "value_outlier_position")
GROUP_SEATS = ("seat_key", "seat_key_scale", "seat_row", "seat_value", "seat_value_scale", "value_seat_row")
NOT_READ = ("residual_valid", "value_outlier_position", "spill_count", "value_seat_row")
OTT = {
    "group_size": 128, "key_window": 32, "key_step": 128, "value_window": 32, "value_step": 128,
    "outlier_capacity": SEATS,
}  # fmt: skip
OTT_PLUS = OTT | {"range_search": True, "rotate_values": True}
SEATED = OTT_PLUS | {"outlier_capacity": 0}
KIVI = {"group_size": 32, "key_window": 0, "key_step": RING, "value_window": RING, "value_step": 1}


class Trace:
    """Both launchers as one graph over fake CUDA tensors; the batch is symbolic, the number of pages unbacked."""

    def __init__(self, options, q_len=None, coded_window=True):
        self.coded_window = coded_window
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self.options = options
        with self.mode:
            self.batch = self.symbol("batch", 5)
            self.q_len = self.symbol("q_len", 37) if q_len is None else q_len
            with self.shapes.ignore_fresh_unbacked_symbols():
                self.pages = self.shapes.create_unbacked_symint()
            torch._check(self.pages > 0)
            heads_last = [
                self.empty(self.q_len, heads, HEAD_DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS)
            ]
            mask = self.empty(1, self.q_len, self.q_len + 1000, dtype=torch.bool)
            valid = self.empty(self.q_len, dtype=torch.bool)
            lengths = torch.empty(4, 3, dtype=torch.int64, device="cuda")
            state = self.state()
            self.graph = make_fx(self.call_with(options), tracing_mode="fake", _allow_non_fake_inputs=True)(
                *heads_last, mask, valid, lengths, state
            )

    def symbol(self, name, hint):
        expression = self.shapes.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        return self.shapes.create_symintnode(expression, hint=hint)

    def empty(self, *shape, dtype=torch.float16):
        return torch.empty((self.batch, *shape), dtype=dtype, device="cuda")

    def state(self):
        groups = 128 // self.options["group_size"]
        state = {
            "residual_valid": self.empty(RING, dtype=torch.uint8),
            "spill_count": self.empty(KV_HEADS, dtype=torch.int32),
        }
        for role, constants in (("key", (groups, HEAD_DIM)), ("value", (1, 128))):
            state[f"{role}_codes"] = self.empty(KV_HEADS, self.pages, 4 * HEAD_DIM * 2, dtype=torch.int32)
            state[f"{role}_scale"] = self.empty(KV_HEADS, self.pages, *constants)
            state[f"{role}_zero_point"] = self.empty(KV_HEADS, self.pages, *constants)
            state[f"{role}_residual"] = self.empty(KV_HEADS, RING, HEAD_DIM)
            state[f"outlier_{role}"] = self.empty(KV_HEADS, SEATS + SPILL, HEAD_DIM)
        for name in ("outlier_position", "value_outlier_position"):
            state[name] = self.empty(KV_HEADS, SEATS + SPILL, dtype=torch.int32)
        if self.options is SEATED:
            rows = (KV_HEADS, self.pages, 2)
            for role, row in (("key", "seat_row"), ("value", "value_seat_row")):
                state[f"seat_{role}"] = self.empty(*rows, HEAD_DIM, dtype=torch.int8)
                state[f"seat_{role}_scale"] = self.empty(*rows)
                state[row] = self.empty(*rows, dtype=torch.int8)
        if self.options in (OTT_PLUS, SEATED):
            state["value_zero_point"] = None
            state["key_order"] = self.empty(KV_HEADS, HEAD_DIM, dtype=torch.int16)
            for role in ("key", "value") if self.coded_window else ():
                state[f"{role}_residual"] = self.empty(KV_HEADS, RING, HEAD_DIM, dtype=torch.int8)
                state[f"{role}_residual_scale"] = self.empty(KV_HEADS, RING)
        return state

    @staticmethod
    def call_with(options):
        def call(query, key, value, mask, valid, lengths, state):
            read = {name: tensor for name, tensor in state.items() if name not in NOT_READ}
            read["rotate_values"] = options.get("rotate_values", False)
            output = attend(query, key, value, mask, lengths, 2, 0.1, **read, key_bits=2, value_bits=2)
            append(key, value, valid, lengths, 2, **state, **options, key_bits=2, value_bits=2)
            return output

        return call

    def layers(self):
        """Both ops for the first and the second row of the lengths, as one graph."""

        def call(query, key, value, mask, valid, lengths, state):
            lengths = lengths.narrow(1, 0, 3)
            read = {name: tensor for name, tensor in state.items() if name not in NOT_READ}
            for site in range(2):
                affine_attend(query, key, value, mask, lengths, site, 7, 0.1, **read, key_bits=2, value_bits=2)
                affine_append(key, value, valid, lengths, site, **state, **self.options, key_bits=2, value_bits=2)

        with self.mode:
            heads = [self.empty(count, self.q_len, HEAD_DIM) for count in (HEADS, KV_HEADS, KV_HEADS)]
            mask = self.empty(1, 1, 1000, dtype=torch.bool)
            valid = self.empty(self.q_len, dtype=torch.bool)
            lengths = torch.empty(2, LENGTHS_WIDTH, dtype=torch.int64, device="cuda")
            self.graph = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(
                *heads, mask, valid, lengths, self.state()
            )

    def launches(self):
        return [
            node for node in self.graph.graph.nodes if node.target is triton_kernel_wrap.triton_kernel_wrapper_mutation
        ]

    def mutated(self, node):
        arguments = {
            name: argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument
            for name, argument in node.kwargs["kwargs"].items()
        }
        with self.mode, hopper():
            names = triton_kernel_wrap.get_mutated_tensors(
                node.kwargs["kernel_idx"], node.kwargs["constant_args_idx"], arguments,
                node.kwargs["tma_descriptor_metadata"],
            )  # fmt: skip
        return {name.removesuffix("_ptr") for name in names}


@contextmanager
def hopper() -> Iterator[None]:
    """A driver that says there is a GPU, for the front end of the compiler; the real one, if there is one."""
    if torch.cuda.is_available():
        yield
        return
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_active_torch_device(self):
            return torch.device("cuda", 0)

    # `reset_active` would look for a real driver.
    with mock.patch.object(triton.runtime.driver, "_active", Driver()):
        yield


@pytest.mark.parametrize("q_len", [1, None], ids=["decode", "chunk"])
@pytest.mark.parametrize(
    "options, launches",
    [(OTT, {1: 4, None: 7}), (OTT_PLUS, {1: 4, None: 10}), (SEATED, {1: 4, None: 10}), (KIVI, {1: 4, None: 6})],
    ids=["ott", "ott+ with a pool", "ott+", "kivi"],
)
def test_launchers_trace_without_guards(options, launches, q_len):
    trace = Trace(options, q_len)
    # Two to attend. To append: two that encode whole pages, the choice of those kept apart, one or two stores. A step
    # of `ott+` takes no more; a chunk takes two rotations of values, and the order of channels before it is encoded.
    assert len(trace.launches()) == launches[q_len]
    assert trace.shapes.guards == []


def test_large_batches_read_the_window_in_one_program_each():
    trace = Trace(SEATED, 1)
    sizes = trace.launches()[0].kwargs["kwargs"]
    pairs = trace.batch * KV_HEADS
    window_parts = sizes["window_parts"].meta["val"]
    # With the five sequences of the trace there are many programs, so there are parts for the seats, too.
    expected = {1: 3 + 198 * 2 // 24, 5: 3 + 39 * 2 // 24, 96: 2, 200: 1, 4000: 1}
    expression = window_parts.node.expr
    (symbol,) = expression.free_symbols
    assert pairs.node.expr.free_symbols == {symbol}
    assert {batch: int(expression.subs(symbol, batch)) for batch in expected} == expected


def test_seats_beside_a_window_in_full_precision_have_programs_of_their_own():
    trace = Trace(SEATED, 1, coded_window=False)
    assert len(trace.launches()) == 4 and trace.shapes.guards == []
    sizes = trace.launches()[0].kwargs["kwargs"]
    for name, expected in (
        ("seat_parts", {1: 1 + 198 * 2 // 24, 5: 1 + 39 * 2 // 24, 96: 1 + 2 * 2 // 24, 4000: 1}),
        ("window_parts", {1: 3, 5: 3, 96: 2, 4000: 1}),
    ):
        expression = sizes[name].meta["val"].node.expr
        (symbol,) = expression.free_symbols
        assert {batch: int(expression.subs(symbol, batch)) for batch in expected} == expected


def test_kernels_mutate_what_the_operators_declare():
    trace = Trace(OTT)
    names = [trace.mutated(node) for node in trace.launches()]
    stored = {*KEY_STATE, *VALUE_STATE}
    encoded = {"codes", "scale", "zero_point", "hard"}
    assert names[:4] == [{"partial", "log_sum"}, {"output"}, {*encoded, "score"}, encoded]
    assert names[4:] == [{*POOL, "spill_count", "replaced", "hard"}, stored, stored]


@pytest.mark.parametrize(
    "options, apart",
    [(OTT_PLUS, {*POOL, "spill_count"}), (SEATED, {*GROUP_SEATS})],
    ids=["pool", "seats"],
)
def test_a_step_of_ott_plus_orders_channels_as_it_keeps_tokens_apart(options, apart):
    trace = Trace(options, 1)
    names = [trace.mutated(node) for node in trace.launches()]
    assert names[:3] == [{"partial", "log_sum"}, {"output"}, {*apart, "replaced", "key_order"}]
    rows = {"key_row_scale", "value_row_scale"}
    assert names[3] == {*KEY_STATE, *VALUE_STATE, *rows} - {"value_zero_point"}


def test_seats_are_chosen_before_pages_are_encoded():
    trace = Trace(SEATED)
    names = [trace.mutated(node) for node in trace.launches()]
    at = names.index({*GROUP_SEATS, "replaced"})
    assert {"codes", "scale", "zero_point", "hard"} in names[at + 1 :] and {"key_order"} in names[:at]


def test_layers_differ_in_addresses_alone():
    trace = Trace(OTT, 1)
    trace.layers()
    constants = [
        triton_kernel_wrap.kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
        for node in trace.launches()
    ]
    per_layer = len(constants) // 2
    assert per_layer == 4 and constants[:per_layer] == constants[per_layer:]
    # Rows of four numbers begin where wide loads may.
    addresses = [
        node.kwargs["kwargs"]["lengths_ptr"].meta["val"]
        for node in trace.launches()
        if "lengths_ptr" in node.kwargs["kwargs"]
    ]
    assert {address.storage_offset() * address.itemsize % 16 for address in addresses} == {0}


def test_each_kernel_is_analyzed_once():
    trace = Trace(OTT, 1)
    trace.layers()
    launches = trace.launches()
    expected = [trace.mutated(node) for node in launches]
    generate = triton_kernel_wrap.generate_ttir
    with mock.patch.object(triton_kernel_wrap, "generate_ttir", side_effect=generate) as generating:
        with kernel_writes_remembered():
            assert [trace.mutated(node) for node in launches] == expected
            count = generating.call_count
            assert count <= len(launches) // 2
            assert [trace.mutated(node) for node in launches] == expected
            assert generating.call_count == count
        trace.mutated(launches[0])
        assert generating.call_count == count + 1, "outside nothing is remembered"
