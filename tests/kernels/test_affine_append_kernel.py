"""The append kernels store what the plain-torch definition stores, call after call."""

import pytest
import torch
from affine_world import SITE, Case, World

from ottfx.kernels.affine_append import append
from ottfx.mixed_words import steep_heads, unpack_mixed
from ottfx.reference import unpack_page
from tests.tolerances import DIFFERENT_CODE_SHARE, DIFFERENT_CONSTANT_SHARE, FP16_ULP, TIED_SHARE

SMALL = [
    (Case(), (70, 1, 30, 100)),
    (Case(batch=2, kv_heads=2, key_bits=3, value_bits=3, dtype=torch.float16), (65, 40)),
    (Case(group_size=64, key_bits=4, value_bits=8, residual_length=0, spill=0, dtype=torch.bfloat16), (130, 1, 62, 1)),
    (Case(head_dim=80, key_bits=8, value_bits=3, value_group_size=16, replacement="group"), (33, 32, 40)),
    (Case(head_dim=96, key_bits=3, value_bits=4, score_norm=2, mask_replaced=False, capacity=5), (120, 17)),
    (Case(group_size=128, capacity=0, dtype=torch.float16), (63, 98, 2)),
    (Case(scheme="kivi", value_bits=3), (31, 1, 1, 40, 1)),
    (Case(scheme="kivi", batch=2, key_bits=3, residual_length=96, head_dim=16, dtype=torch.float16), (100, 3, 190)),
    (Case(scheme="kivi", group_size=64, residual_length=128, value_bits=8, head_dim=80), (127, 1, 1)),
]
PLUS = dict(mixed=True, range_search=True, symmetric=True, spill=3, coded_window=True, rotated=True)
SMALL += [
    (Case(**PLUS, seats=2), (70, 1, 30, 100)),
    (Case(**PLUS, seats=3, group_size=64, residual_length=0, dtype=torch.float16), (130, 1, 62, 1)),
    (Case(**PLUS, seats=1, batch=2, kv_heads=2, head_dim=80, group_size=128, score_norm=2), (63, 98, 2)),
    (Case(seats=2, key_bits=3, value_bits=4, value_group_size=16), (100, 40)),
    (Case(**PLUS), (70, 1, 30, 100)),
    (Case(**PLUS, residual_length=0, dtype=torch.float16), (30, 1, 1, 1)),
    (Case(**PLUS, capacity=0, head_dim=48), (95, 1)),
    (Case(rotated=True, dtype=torch.float16), (95, 1)),
    (Case(**PLUS, batch=2, kv_heads=2, head_dim=80, group_size=128, dtype=torch.float16), (63, 98, 2)),
    (Case(mixed=True, head_dim=64), (100,)),
    (Case(coded_window=True, head_dim=48, dtype=torch.bfloat16), (100, 20)),
    (Case(symmetric=True, value_bits=3, value_group_size=16), (100,)),
    (Case(range_search=True, key_bits=4, value_bits=4, value_group_size=16), (100,)),
]
EXACT = dict(range_search=True, symmetric=True, rotated=True, spill=3, key_bits=4, value_bits=4)
SMALL += [(Case(**EXACT, seats=1, group_size=128), (100, 30, 1, 1, 130))]
WHOLE_PAGES = [
    (Case(**EXACT, seats=1, batch=2, kv_heads=2, group_size=128, pages=5, dtype=torch.float16), (400, 60)),
    (Case(**PLUS, seats=2, group_size=128, head_dim=64, pages=5, dtype=torch.float16), (40, 450)),
    (Case(**PLUS, seats=1, batch=2, kv_heads=2, score_norm=2, pages=4), (300, 40)),
    (Case(seats=2, key_bits=4, value_bits=3, value_group_size=16, pages=4), (400,)),
    (Case(**PLUS, batch=2, pages=4), (300, 40)),
    (Case(**PLUS, group_size=128, head_dim=64, pages=5, dtype=torch.float16), (40, 450)),
    (Case(range_search=True, key_bits=3, value_bits=4, value_group_size=16, pages=4), (200,)),
    (Case(pages=6), (600, 40, 100)),
    (Case(batch=2, kv_heads=2, key_bits=3, value_bits=3, value_group_size=16, pages=6, dtype=torch.float16),
     (300, 290)),
    (Case(group_size=128, key_bits=4, value_bits=8, spill=32, pages=8, score_norm=2, dtype=torch.bfloat16), (40, 900)),
    (Case(head_dim=16, group_size=64, key_bits=8, value_bits=4, replacement="group", mask_replaced=False, capacity=5,
          pages=6), (500, 200)),
    (Case(group_size=64, capacity=0, residual_length=0, pages=5), (384, 129)),
    (Case(batch=2, scheme="kivi", key_bits=3, residual_length=96, value_group_size=8, pages=6), (333, 1, 300)),
    (Case(head_dim=96, pages=4), (400,)),
]  # fmt: skip
LARGE = [
    (Case(**PLUS, seats=2, batch=3, kv_heads=8, head_dim=head_dim, group_size=128, pages=40, dtype=dtype),
     (2000, 1, 1500, 95, 1))
    for head_dim, dtype in ((128, torch.bfloat16), (64, torch.float16), (256, torch.bfloat16))
] + [
    (Case(**PLUS, batch=3, kv_heads=8, head_dim=head_dim, group_size=128, pages=40, dtype=dtype),
     (2000, 1, 1500, 95, 1))
    for head_dim, dtype in ((128, torch.bfloat16), (64, torch.float16), (256, torch.bfloat16))
] + [
    (Case(batch=3, kv_heads=8, head_dim=128, group_size=128, spill=32, pages=40, dtype=dtype), (2000, 1, 1500, 95, 1))
    for dtype in (torch.float16, torch.bfloat16)
] + [
    (Case(batch=2, kv_heads=8, head_dim=128, group_size=128, spill=32, pages=70, dtype=torch.bfloat16), (77, 8000, 1)),
    (Case(batch=2, kv_heads=8, head_dim=64, group_size=32, value_group_size=32, key_bits=4, value_bits=3, pages=40,
          dtype=torch.float16), (5000,)),
] + [
    (
        Case(scheme="kivi", batch=2, kv_heads=3, head_dim=256, residual_length=128, value_group_size=64, pages=20,
             key_bits=bits, value_bits=bits, dtype=torch.bfloat16),
        (1000, 1, 300, 27),
    )
    for bits in (2, 3, 4, 8)
]  # fmt: skip


def assert_codes_agree(got, expected, bits, rows, contraction, what, steep=None, searched=False):
    def unpack(words):
        if steep is None:
            return unpack_page(words, bits, rows, contraction)
        return unpack_mixed(words, steep, rows, contraction)

    got, expected = unpack(got).int(), unpack(expected).int()
    difference = (got - expected).abs()
    assert (difference > 1).float().mean() <= (TIED_SHARE if searched else 0.0), what
    assert (difference > 0).float().mean() <= DIFFERENT_CODE_SHARE, what


def assert_constants_agree(got, expected, what, searched=False):
    assert torch.equal(torch.signbit(got), torch.signbit(expected)), what
    beyond = ~torch.isclose(got, expected, rtol=FP16_ULP, atol=1e-6)
    assert beyond.float().mean() <= (TIED_SHARE if searched else 0.0), what
    assert (got != expected).float().mean() <= DIFFERENT_CONSTANT_SHARE, what


def assert_rows_agree(got, expected, role):
    # A product and a sum that are rounded once may end on the other side of a half.
    assert_constants_agree(got[f"{role}_residual_scale"], expected[f"{role}_residual_scale"], role)
    difference = (got[f"{role}_residual"].int() - expected[f"{role}_residual"].int()).abs()
    assert difference.max() <= 1, role
    assert (difference > 0).float().mean() <= DIFFERENT_CODE_SHARE, role


def assert_pools_agree(got, expected, case):
    # As sets, within the seats and within the spill pool: near ties may be ordered either way.
    for rows in (slice(0, case.capacity), slice(case.capacity, None)):
        orders = [state["outlier_position"][..., rows].argsort(-1) for state in (got, expected)]
        for name in ("outlier_position", "value_outlier_position", "outlier_key", "outlier_value"):
            pair = []
            for state, order in zip((got, expected), orders, strict=True):
                part = state[name][:, :, rows]
                live = state["outlier_position"][:, :, rows].gather(-1, order) >= 0
                index = order if part.dim() == 3 else order.unsqueeze(-1).expand(part.shape)
                shape = live if part.dim() == 3 else live.unsqueeze(-1)
                pair.append(torch.where(shape, part.gather(2, index), 0))
            # A token from a window in 8 bits is rounded; the interpreter cuts bfloat16 off instead.
            ulp = torch.finfo(pair[0].dtype).eps if case.coded_window and pair[0].is_floating_point() else 0
            # Two ways to add up a rotated channel round differently.
            border = 1e-5 if case.rotated and name == "outlier_value" else 0.0
            torch.testing.assert_close(*pair, rtol=ulp, atol=border, msg=name)
    assert torch.equal(got["spill_count"], expected["spill_count"])


def assert_seats_agree(got, expected):
    for name in ("seat_row", "value_seat_row"):
        assert torch.equal(got[name], expected[name]), name
    for role in ("key", "value"):
        assert_constants_agree(got[f"seat_{role}_scale"], expected[f"seat_{role}_scale"], role)
        difference = (got[f"seat_{role}"].int() - expected[f"seat_{role}"].int()).abs()
        assert difference.max() <= 1, role
        assert (difference > 0).float().mean() <= DIFFERENT_CODE_SHARE, role


def assert_states_agree(got, expected, case):
    pages = [("key", case.key_bits, 128, case.head_dim), ("value", case.value_bits, case.head_dim, 128)]
    for role, bits, rows, contraction in pages:
        steep = steep_heads(expected["key_order"]) if role == "key" and case.mixed else None
        searched = case.range_search
        codes = got[f"{role}_codes"], expected[f"{role}_codes"]
        assert_codes_agree(*codes, bits, rows, contraction, role, steep, searched)
        for name in (f"{role}_scale", f"{role}_zero_point"):
            if name in expected:
                assert_constants_agree(got[name], expected[name], name, searched)
    if case.mixed:
        assert torch.equal(got["key_order"], expected["key_order"])
    assert torch.equal(got["residual_valid"], expected["residual_valid"])
    if case.coded_window:
        for role in ("key", "value"):
            assert_rows_agree(got, expected, role)
    else:
        # A rotated number is a sum, whose order differs.
        ulp = torch.finfo(case.dtype).eps if case.rotated else 0.0
        torch.testing.assert_close(got["value_residual"], expected["value_residual"], rtol=ulp, atol=8 * ulp)
    if case.seats:
        assert_seats_agree(got, expected)
    if case.scheme == "ott":
        assert case.coded_window or torch.equal(got["key_residual"], expected["key_residual"])
        assert_pools_agree(got, expected, case)
    else:
        # Written back: code * scale + zero_point may be one fused operation.
        ulp = torch.finfo(case.dtype).eps
        torch.testing.assert_close(got["key_residual"], expected["key_residual"], rtol=ulp, atol=8 * ulp)


def check_history(case, steps, padded, device):
    world = World(case)
    for q_len in steps:
        key, value, valid = world.draw(q_len, padded)
        state = {name: tensor.to(device, copy=True) for name, tensor in world.state.items()}
        append(
            key.to(device), value.to(device), None if valid is None else valid.to(device),
            world.lengths_tensor().to(device), SITE, **state, **case.append_options(),
            rotate_values=case.rotated,
        )  # fmt: skip
        world.append(key, value, valid)
        assert_states_agree({name: tensor.cpu() for name, tensor in state.items()}, world.state, case)
    assert world.lengths[1] > 0, "the history packs nothing"


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("case, steps", SMALL, ids=str)
def test_append_stores_what_the_definition_stores(case, steps, padded, kernel_device):
    check_history(case, steps, padded, kernel_device)


@pytest.mark.parametrize("padded", [False, "left"], ids=["real", "left"])
@pytest.mark.parametrize("case, steps", WHOLE_PAGES, ids=str)
def test_whole_pages_of_a_prompt(case, steps, padded, kernel_device):
    check_history(case, steps, padded, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True, "left"], ids=["real", "padded", "left"])
@pytest.mark.parametrize("case, steps", LARGE, ids=str)
def test_append_of_long_prompts(case, steps, padded, kernel_device):
    check_history(case, steps, padded, kernel_device)


def test_non_finite_tokens_are_stored_as_finite_ones(kernel_device):
    case = Case(scheme="kivi", dtype=torch.float16)
    world = World(case)
    key, value, _ = world.draw(64)
    key[0, 0, 5, 2], key[0, 0, 6, 3], value[0, 0, 7, 4] = float("inf"), float("nan"), float("-inf")
    state = {name: tensor.to(kernel_device, copy=True) for name, tensor in world.state.items()}
    lengths = world.lengths_tensor().to(kernel_device)
    append(key.to(kernel_device), value.to(kernel_device), None, lengths, SITE, **state, **case.append_options())
    world.append(key, value, None)
    for name in ("key_codes", "key_scale", "key_zero_point", "value_codes", "value_scale", "value_zero_point"):
        assert torch.equal(state[name].cpu(), world.state[name]), name
    assert state["key_scale"].isfinite().all()


def test_a_group_without_real_tokens_has_no_scale(kernel_device):
    case = Case()
    world = World(case)
    key, value, _ = world.draw(64)
    state = {name: tensor.to(kernel_device, copy=True) for name, tensor in world.state.items()}
    valid = torch.arange(64).expand(1, 64) >= 40
    append(
        key.to(kernel_device), value.to(kernel_device), valid.to(kernel_device),
        world.lengths_tensor().to(kernel_device), SITE, **state, **case.append_options(),
    )  # fmt: skip
    world.append(key, value, valid)
    assert world.lengths[1] == 32
    assert not state["key_scale"].any() and not state["key_codes"].any() and not state["value_codes"].any()
    assert (state["outlier_position"] == -1).all()
    assert_states_agree({name: tensor.cpu() for name, tensor in state.items()}, world.state, case)


def test_a_call_that_packs_nothing_changes_only_the_ring(kernel_device):
    world = World(Case())
    world.run((40,))
    key, value, _ = world.draw(1)
    state = {name: tensor.to(kernel_device, copy=True) for name, tensor in world.state.items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    lengths = world.lengths_tensor().to(kernel_device)
    append(key.to(kernel_device), value.to(kernel_device), None, lengths, SITE, **state, **world.case.append_options())
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert changed == {"key_residual", "value_residual", "residual_valid"}
    assert torch.equal(state["key_residual"][:, :, 40].cpu(), key[:, :, 0])


@pytest.mark.parametrize("score_norm", [1, 2])
def test_whole_pages_with_large_numbers(score_norm, kernel_device):
    case = Case(dtype=torch.bfloat16, pages=5, score_norm=score_norm)
    world = World(case)
    key, value, _ = world.draw(600)
    key[0, 0, 140, 2], key[0, 0, 310, 4], value[0, 0, 430, 4] = float("inf"), float("nan"), -1e6
    state = {name: tensor.to(kernel_device, copy=True) for name, tensor in world.state.items()}
    lengths = world.lengths_tensor().to(kernel_device)
    append(key.to(kernel_device), value.to(kernel_device), None, lengths, SITE, **state, **case.append_options())
    world.append(key, value, None)
    assert_states_agree({name: tensor.cpu() for name, tensor in state.items()}, world.state, case)
