"""Schemes that store by tokens trace to their kernels with symbolic sizes and without guards; no GPU is needed."""

import importlib
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

pytest.importorskip("triton")

from torch._dynamo.source import ConstantSource  # noqa: E402
from torch._higher_order_ops import triton_kernel_wrap  # noqa: E402

from ottfx.registry import get_scheme, make_config  # noqa: E402
from ottfx.schemes.base import ROLES, CacheShape  # noqa: E402
from tests.kernels.test_launchers_trace import hopper  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]
KV_HEADS, HEADS, HEAD_DIM = 8, 32, 128


def trace(scheme, q_len):
    """The graph of attend and append over fake CUDA tensors; the batch is symbolic, the number of pages unbacked."""
    shapes = ShapeEnv()
    implementation, config = get_scheme(scheme), make_config(scheme)

    def symbol(name, hint):
        expression = shapes.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        return shapes.create_symintnode(expression, hint=hint)

    # The bodies of the ops: an op itself would be one node.
    module = importlib.import_module(type(implementation).__module__)

    def call(query, key, value, mask, lengths, *state):
        output = module._attend(query, key, value, mask, lengths, 2, 7, 0.1, *state, *implementation.constants(config))
        module._append(key, value, mask, lengths, 2, *state, *implementation.constants(config))
        return output

    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    with mode:
        batch = symbol("batch", 5)
        q_len = symbol("q_len", 37) if q_len is None else q_len
        with shapes.ignore_fresh_unbacked_symbols():
            pages = shapes.create_unbacked_symint()
        torch._check(pages > 0)
        shape = CacheShape(
            batch_size=batch, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, pages=pages, dtype=torch.float16,
            device=torch.device("cuda"),
        )  # fmt: skip
        specs = {name: spec for role in ROLES for name, spec in implementation.state_spec(config, role, shape).items()}
        state = [torch.empty(spec.shape, dtype=spec.dtype, device="cuda") for spec in specs.values()]
        heads = [
            torch.empty(batch, q_len, n, HEAD_DIM, dtype=torch.float16, device="cuda").transpose(1, 2)
            for n in (HEADS, KV_HEADS, KV_HEADS)
        ]
        mask = torch.empty(batch, 1, q_len, q_len + 1000, dtype=torch.bool, device="cuda")
        lengths = torch.empty(4, 4, dtype=torch.int64, device="cuda").narrow(1, 0, 3)
        graph = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(*heads, mask, lengths, *state)
    launches = [n for n in graph.graph.nodes if n.target is triton_kernel_wrap.triton_kernel_wrapper_mutation]
    return shapes, mode, launches, set(specs)


def mutated(mode, node):
    arguments = {
        name: argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument
        for name, argument in node.kwargs["kwargs"].items()
    }
    with mode, hopper():
        names = triton_kernel_wrap.get_mutated_tensors(
            node.kwargs["kernel_idx"], node.kwargs["constant_args_idx"], arguments,
            node.kwargs["tma_descriptor_metadata"],
        )  # fmt: skip
    return {name.removesuffix("_ptr") for name in names}


@pytest.mark.parametrize("q_len", [1, None], ids=["decode", "chunk"])
@pytest.mark.parametrize("scheme", ["turbo", "polar"])
def test_ops_trace_without_guards(scheme, q_len):
    shapes, _, launches, _ = trace(scheme, q_len)
    # Two rotations, attention and its combination; one that stores.
    assert len(launches) == 5
    assert shapes.guards == []


@pytest.mark.parametrize("scheme", ["turbo", "polar"])
def test_append_writes_the_state_and_attend_does_not(scheme):
    _, mode, launches, state = trace(scheme, 1)
    names = [mutated(mode, node) for node in launches]
    assert names[:4] == [{"output"}, {"output"}, {"partial", "log_sum"}, {"output"}]
    assert names[4] == {name.replace("_norm", "_scale").replace("_radius", "_scale") for name in state}
