"""The C++ of `kernels/cpu` gives what the plain-torch definition gives; without a compiler the definition runs."""

import dataclasses
import logging
import os

import pytest
import torch
from affine_world import SITE, Case, World
from test_affine_attend_kernel import PLUS, SMALL, assert_close, make_mask

import ottfx
from ottfx import affine_read, cpu_attend, mixed_words
from ottfx.opaque_call import opaque_call
from ottfx.ops import affine_attend
from tests.tiny_models import tiny_model

pytestmark = [
    pytest.mark.xdist_group("cpu_attend"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="has nothing to do with Triton"),
]
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def library():
    """Built once, or the tests of its results have nothing to look at."""
    built = cpu_attend._library()
    if built is None:
        pytest.skip("no C++ compiler for Inductor here")
    return built


def run_fused(world, query, key, value, mask, **options):
    operands = (query, key, value, mask, world.lengths_tensor(), SITE)
    assert cpu_attend.takes(query, key, mask, world.read_state())
    return cpu_attend.attend(*operands, 0.3, **world.read_state(), **world.case.read_options(), **options)


def run_definition(world, query, key, value, mask, **options):
    operands = (query, key, value, mask, world.lengths_tensor(), SITE, world.lengths[0])
    return affine_read.attend(*operands, 0.3, **world.read_state(), **world.case.read_options(), **options)


def check(case, steps, q_len, mask_kind):
    world = World(case)
    world.run(steps)
    key, value, _ = world.draw(q_len)
    query = world.draw_query(q_len)
    mask = make_mask(mask_kind, world, q_len)
    # Both compute in float32, whatever they read; a result that is rounded to 16 bits in the end would hide how.
    exact = {"result_dtype": FLOAT}
    got = run_fused(world, query, key, value, mask, **exact)
    assert_close(got, run_definition(world, query, key, value, mask, **exact), FLOAT)
    assert torch.equal(run_fused(world, query, key, value, mask), got.to(case.dtype))
    return world


@pytest.mark.parametrize("case, steps, q_len, mask_kind", SMALL, ids=str)
def test_the_cases_of_the_triton_kernels(case, steps, q_len, mask_kind):
    check(case, steps, q_len, mask_kind)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 128, 256])
def test_widths_and_head_sizes(bits, head_dim):
    dtype = (FLOAT, HALF, BFLOAT)[bits % 3]
    case = Case(key_bits=bits, value_bits=bits, head_dim=head_dim, value_group_size=16, heads=3, dtype=dtype)
    check(case, (300, 1), 1, "bool")


@pytest.mark.parametrize("head_dim", [16, 96, 512])
def test_mixed_widths_and_head_sizes(head_dim):
    case = Case(**PLUS, batch=2, heads=4, kv_heads=2, head_dim=head_dim)
    world = check(case, (150, 20), 1, "none")
    assert mixed_words.steep_heads(world.state["key_order"]).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("q_len", [1, 2, 3, 4])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (9, 3), (5, 1)])
@pytest.mark.parametrize("kind", ["none", "causal", "heads", "float"])
def test_heads_queries_and_masks(q_len, heads, kv_heads, kind):
    check(Case(**PLUS, batch=2, heads=heads, kv_heads=kv_heads, head_dim=32), (150, 20), q_len, kind)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("off", ["mixed", "symmetric", "coded_window", "pool"])
def test_each_part_may_be_missing(off, dtype):
    case = Case(**PLUS, batch=2, heads=3, head_dim=64, group_size=128, dtype=dtype)
    case = dataclasses.replace(case, **({"capacity": 0} if off == "pool" else {off: False}))
    check(case, (290,), 1, "causal")


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_joins_the_same_parts(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Case(**PLUS, heads=3, pages=12, dtype=FLOAT), (1400,), 1, "bool")
    finally:
        torch.set_num_threads(before)


def test_a_query_that_may_see_nothing_gives_zero():
    world = World(Case(heads=1))
    world.run((100,))
    key, value, _ = world.draw(2)
    mask = torch.ones(1, 1, 2, 102, dtype=torch.bool)
    mask[:, :, 1] = False
    got = run_fused(world, world.draw_query(2), key, value, mask)
    assert got[:, :, 0].abs().min() > 0
    assert not got[:, :, 1].any()


def test_storage_that_is_not_live_is_never_seen():
    world = World(Case(heads=1))
    world.run((100,))
    key, value, _ = world.draw(1)
    query = world.draw_query(1)
    expected = run_fused(world, query, key, value, None)
    past, packed, ring = world.lengths[0], world.lengths[2], world.case.ring()
    for role, behind in (("key", (..., slice(packed // 32, None), slice(None))), ("value", (..., slice(packed, None)))):
        for name in ("scale", "zero_point"):
            constants = world.state[f"{role}_{name}"]
            constants[:, :, 0][behind] = float("nan")
            constants[:, :, 1:] = float("nan")
        free = [row for row in range(ring) if row not in {token % ring for token in range(packed, past)}]
        world.state[f"{role}_residual"][:, :, free] = float("nan")
        world.state[f"outlier_{role}"][world.state["outlier_position"] < 0] = float("nan")
    assert torch.equal(run_fused(world, query, key, value, None), expected)


def test_exponents_of_all_sizes_in_one_softmax():
    world = World(Case(heads=1, scheme="kivi", residual_length=128, dtype=FLOAT))
    world.run((100,))
    key, value, _ = world.draw(1)
    for size in (0.0, 1e-3, 1.0, 30.0, 1e3):
        query = world.draw_query(1) * size
        got = run_fused(world, query, key, value, None)
        assert_close(got, run_definition(world, query, key, value, None), FLOAT)


def attend_as_the_opaque_op_does(world, query, key, value):
    with opaque_call():
        return affine_attend(
            query, key, value, None, world.lengths_tensor(), SITE, world.lengths[0], 0.3,
            **world.read_state(), **world.case.read_options(),
        )  # fmt: skip


def test_many_queries_and_scattered_state_run_the_definition(monkeypatch):
    world = World(Case(heads=1))
    world.run((100,))
    many, few = cpu_attend.MOST_ROWS + 1, 1
    for q_len in (many, few):
        key, value, _ = world.draw(q_len)
        if q_len == few:
            world.state["key_residual"] = world.state["key_residual"].mT.contiguous().mT
        assert not cpu_attend.takes(world.draw_query(q_len), key, None, world.read_state())
    monkeypatch.setattr(cpu_attend, "attend", None)
    assert torch.isfinite(attend_as_the_opaque_op_does(world, world.draw_query(1), key, value)).all()


def test_without_a_compiler_the_definition_runs_and_one_warning_says_why(monkeypatch, caplog, request):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no working C++ compiler found\nand more")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", no_compiler)
    request.addfinalizer(cpu_attend._library.cache_clear)
    cpu_attend._library.cache_clear()
    world = World(Case(heads=1))
    world.run((100,))
    query = world.draw_query(1)
    with caplog.at_level(logging.WARNING, logger="ottfx"):
        for _ in range(2):
            key, value, _ = world.draw(1)
            got = attend_as_the_opaque_op_does(world, query, key, value)
            assert torch.equal(got, run_definition(world, query, key, value, None))
    assert [record.getMessage() for record in caplog.records] == [
        "ottfx: CPU attention runs in plain torch, which is slow: its C++ was not built. no working C++ compiler found"
    ]


def test_a_compiled_model_decodes_in_cpp(monkeypatch):
    """The door takes the path of these tests: what `generate` reads comes from `cpu_attend.attend`."""
    calls = []
    attend = cpu_attend.attend
    monkeypatch.setattr(cpu_attend, "attend", lambda *args, **named: calls.append(args) or attend(*args, **named))
    model = ottfx.compile(tiny_model("llama"), bits=2, lower="eager", residual_length=0, group_size=32)
    with torch.no_grad():
        model.generate(torch.arange(1, 41)[None], max_new_tokens=4, do_sample=False)
    assert len(calls) == 3 * model.config.num_hidden_layers
