"""The attend kernels give what the plain-torch definition gives, for every layout, mask and part of the storage."""

import pytest
import torch
from affine_world import SITE, Case, World

from ottfx.kernels import decode_plan
from ottfx.kernels.affine_attend import attend
from ottfx.ops import affine_attend
from tests.tolerances import ATTENTION_ERROR

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
# bfloat16 is among the large cases only: the interpreter multiplies its bits as if they were integers.
SMALL = [
    (Case(heads=3), (100,), 1, "none"),
    (Case(batch=2, heads=4, kv_heads=2, key_bits=3, value_bits=3, dtype=HALF), (140, 1), 1, "bool"),
    (Case(key_bits=4, value_bits=8, group_size=64, dtype=HALF), (170,), 1, "float"),
    (Case(heads=8, key_bits=8, value_bits=4, head_dim=80, value_group_size=16, dtype=HALF), (90,), 3, "causal"),
    (Case(head_dim=96, value_group_size=96, key_bits=3, dtype=HALF), (150,), 5, "heads"),
    (Case(group_size=128, capacity=0, head_dim=64, value_group_size=32, dtype=HALF), (290,), 2, "bool"),
    (Case(mask_replaced=False, head_dim=16, dtype=FLOAT), (100,), 2, "causal"),
    (Case(scheme="kivi", heads=6, kv_heads=2, dtype=HALF), (100, 1), 1, "bool"),
    (Case(scheme="kivi", residual_length=96, value_bits=3, head_dim=48, dtype=FLOAT), (150,), 18, "causal"),
    (Case(dtype=HALF), (20,), 1, "none"),
    (Case(dtype=HALF), (), 4, "causal"),
    (Case(dtype=HALF), (140,), 1, "none"),  # codes end within a tile
]
PLUS = dict(mixed=True, range_search=True, symmetric=True, spill=3, coded_window=True, rotated=True)
SMALL += [
    (Case(**PLUS, seats=2, head_dim=64, group_size=128, pages=6, dtype=HALF), (600,), 1, "none"),
    (Case(**PLUS, seats=3, batch=2, heads=4, kv_heads=2, head_dim=80, dtype=HALF), (40, 250), 2, "heads"),
    (Case(**PLUS, seats=1, heads=6, kv_heads=2, head_dim=96, group_size=64, dtype=HALF), (100, 30), 1, "bool"),
    (Case(**PLUS, seats=2, heads=3, dtype=FLOAT), (100, 30), 3, "causal"),
    (Case(**PLUS, seats=2, value_bits=4, value_group_size=16, head_dim=48, dtype=HALF), (90,), 1, "float"),
    (Case(seats=2, key_bits=3, value_bits=4, dtype=HALF), (200,), 1, "bool"),
    (Case(**PLUS, head_dim=64, dtype=HALF), (200,), 1, "none"),
    (Case(**PLUS, batch=2, heads=4, kv_heads=2, head_dim=80, group_size=128, dtype=HALF), (40, 250), 2, "bool"),
    (Case(**PLUS, heads=3, dtype=FLOAT), (100, 30), 3, "causal"),
    (Case(**PLUS, heads=6, kv_heads=2, head_dim=96, dtype=HALF), (100, 30), 1, "bool"),
    (Case(rotated=True, heads=4, kv_heads=4, dtype=HALF), (), 1, "none"),
    (Case(**PLUS, value_bits=4, value_group_size=16, head_dim=48, dtype=HALF), (90,), 1, "float"),
    (Case(symmetric=True, key_bits=4, value_bits=3, dtype=HALF), (90,), 1, "none"),
]
# A window in full precision beside seats in 8 bits, which have programs of their own.
EXACT = dict(range_search=True, symmetric=True, rotated=True, spill=3, key_bits=4, value_bits=4)
SMALL += [
    (Case(**EXACT, seats=1, head_dim=64, group_size=128, pages=6, dtype=HALF), (600,), 1, "none"),
    (Case(**EXACT, seats=3, batch=2, heads=4, kv_heads=2, head_dim=80, dtype=HALF), (40, 250), 2, "heads"),
    (Case(**EXACT, seats=2, batch=2, heads=4, kv_heads=2, head_dim=64, group_size=64, dtype=HALF), (30,), 1, "bool"),
]
LARGE = [
    (
        Case(batch=3, heads=32, kv_heads=8, head_dim=128, group_size=128, pages=40, dtype=dtype),
        (2000, 1, 1500, 95), n, kind,
    )
    for dtype in (HALF, BFLOAT)
    for n, kind in ((1, "none"), (1, "bool"), (4, "causal"), (300, "causal"), (33, "float"))
] + [
    (
        Case(scheme="kivi", batch=2, heads=12, kv_heads=4, head_dim=head_dim, residual_length=128, pages=20,
             key_bits=bits, value_bits=bits, dtype=dtype),
        (1000, 27), n, "bool",
    )
    for bits in (2, 3, 4, 8)
    for head_dim, dtype in ((256, HALF), (80, BFLOAT), (64, FLOAT), (96, HALF))
    for n in (1, 70)
] + [
    (
        Case(**PLUS, seats=seats, batch=3, heads=heads, kv_heads=4, head_dim=head_dim, group_size=group_size, pages=40,
             dtype=dtype),
        (2000, 1, 1500, 95), n, kind,
    )
    for seats in (0, 2)
    for head_dim, group_size, dtype in ((128, 128, BFLOAT), (64, 128, HALF), (256, 64, BFLOAT), (96, 32, HALF))
    for heads, n, kind in ((4, 1, "none"), (16, 1, "bool"), (8, 4, "causal"), (4, 200, "causal"))
] + [
    (
        Case(**EXACT, seats=1, batch=3, heads=heads, kv_heads=4, head_dim=head_dim, group_size=128, pages=40,
             dtype=BFLOAT),
        (2000, 1, 1500, 95), n, kind,
    )
    for head_dim in (128, 64, 256, 96)
    for heads, n, kind in ((4, 1, "none"), (16, 1, "bool"), (8, 4, "causal"))
]  # fmt: skip


def make_mask(kind, world, q_len):
    if kind == "none":
        return None
    case, past = world.case, world.lengths[0]
    generator = torch.Generator().manual_seed(3)
    causal = torch.arange(past + q_len) <= past + torch.arange(q_len)[:, None]
    if kind == "causal":
        return causal[None, None]
    if kind == "heads":
        return causal & (torch.rand(1, case.heads, q_len, past + q_len, generator=generator) > 0.2)
    padding = torch.rand(case.batch, 1, 1, past + q_len, generator=generator) > 0.2
    padding[..., -1] = True
    allowed = causal & padding
    if kind == "bool":
        return allowed.expand(case.batch, case.heads, -1, -1) if q_len > 1 else allowed
    bias = torch.randn(allowed.shape, generator=generator).to(case.dtype)
    return torch.where(allowed, bias, torch.finfo(case.dtype).min)


def run_kernel(world, query, key, value, mask, device):
    def move(tensor):
        return None if tensor is None else tensor.to(device)

    state = {name: move(tensor) for name, tensor in world.read_state().items()}
    lengths = move(world.lengths_tensor())
    result = attend(
        move(query), move(key), move(value), move(mask), lengths, SITE, 0.3, **state, **world.case.read_options(),
        rotate_values=world.case.rotated,
    )  # fmt: skip
    return result.cpu()


def run_definition(world, query, key, value, mask):
    return affine_attend(
        query, key, value, mask, world.lengths_tensor(), SITE, world.lengths[0], 0.3,
        **world.read_state(), **world.case.read_options(), rotate_values=world.case.rotated,
    )  # fmt: skip


def assert_close(got, expected, dtype):
    assert got.shape == expected.shape and got.dtype == expected.dtype == dtype
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    # The softmax scale here is the same for all head sizes, so scores, and what rounding does to them, grow with sqrt.
    assert error <= ATTENTION_ERROR[dtype] * max(1.0, got.shape[-1] / 128) ** 0.5


def check(case, steps, q_len, mask_kind, device):
    world = World(case)
    world.run(steps)
    key, value, _ = world.draw(q_len)
    query = world.draw_query(q_len)
    mask = make_mask(mask_kind, world, q_len)
    got = run_kernel(world, query, key, value, mask, device)
    assert_close(got, run_definition(world, query, key, value, mask), case.dtype)


@pytest.mark.parametrize("case, steps, q_len, mask_kind", SMALL, ids=str)
def test_attend_gives_what_the_definition_gives(case, steps, q_len, mask_kind, kernel_device):
    check(case, steps, q_len, mask_kind, kernel_device)


@pytest.mark.parametrize("seats", [0, 3])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("q_len", [1, 2])
def test_rows_are_cut_into_any_number_of_shares(monkeypatch, parts, q_len, seats, kernel_device):
    monkeypatch.setattr(decode_plan, "window_parts", lambda programs, ring_rows, slots: parts)
    case = Case(group_size=128, coded_window=True, seats=seats, dtype=HALF)
    check(case, (290,), q_len, "bool", kernel_device)


def test_shares_of_the_ring_are_fewer_where_programs_are_enough():
    assert [decode_plan.window_parts(programs, 160, 1584) for programs in (8, 528, 700, 1000, 9000)] == [3, 3, 2, 1, 1]
    assert decode_plan.window_parts(8, 32, 1584) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case, steps, q_len, mask_kind", LARGE, ids=str)
def test_attend_over_long_caches(case, steps, q_len, mask_kind, kernel_device):
    check(case, steps, q_len, mask_kind, kernel_device)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_may_see_nothing_gives_zero(kind, kernel_device):
    world = World(Case(heads=1, rotated=True, dtype=torch.float16))
    world.run((100,))
    key, value, _ = world.draw(2)
    mask = torch.ones(1, 1, 2, 102, dtype=torch.bool)
    mask[:, :, 1] = False
    if kind == "float":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float16).min).half()
    got = run_kernel(world, world.draw_query(2), key, value, mask, kernel_device)
    assert got[:, :, 0].abs().min() > 0
    assert not got[:, :, 1].any()


def test_storage_that_is_not_live_is_never_seen(kernel_device):
    world = World(Case(heads=1, dtype=torch.float16))
    world.run((100,))
    key, value, _ = world.draw(1)
    query = world.draw_query(1)
    expected = run_kernel(world, query, key, value, None, kernel_device)
    past, packed = world.lengths[0], world.lengths[2]
    for name in ("key_scale", "key_zero_point"):
        world.state[name][:, :, 0, packed // 32 :] = float("nan")
        world.state[name][:, :, 1:] = float("nan")
    for name in ("value_scale", "value_zero_point"):
        world.state[name][:, :, 0, :, packed:] = float("nan")
        world.state[name][:, :, 1:] = float("nan")
    world.state["key_codes"][:, :, 1:] = -1
    ring = world.case.ring()
    for row in set(range(ring)) - {token % ring for token in range(packed, past)}:
        world.state["key_residual"][:, :, row] = float("nan")
        world.state["value_residual"][:, :, row] = float("nan")
    empty = world.state["outlier_position"] < 0
    assert empty.any()
    world.state["outlier_key"][empty] = float("nan")
    world.state["outlier_value"][empty] = float("nan")
    assert torch.equal(run_kernel(world, query, key, value, None, kernel_device), expected)


def test_marked_slots_are_not_attended(kernel_device):
    world = World(Case(heads=1, capacity=0, dtype=torch.float32))
    world.run((100,))
    key, value, _ = world.draw(1)
    query = world.draw_query(1)
    mask = torch.ones(1, 1, 1, 101, dtype=torch.bool)
    mask[..., 5] = mask[..., 40] = False
    expected = run_kernel(world, query, key, value, mask, kernel_device)
    scale = world.state["value_scale"]
    # -0.0 counts as marked too, and a mark on another group than the first would not.
    scale[0, 0, 0, 0, 5] = -0.0
    scale[0, 0, 0, 0, 40] = -scale[0, 0, 0, 0, 40]
    torch.testing.assert_close(run_kernel(world, query, key, value, None, kernel_device), expected)
