"""What every registered scheme owes its callers: specs, ops, reading, chunking, rewinding."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from scheme_store import PAGE, ROLES, Store, random_tokens, state_difference

from ottfx.registry import get_scheme, make_config, scheme_names
from ottfx.schemes.affine import AffineScheme
from ottfx.schemes.base import ANY_LENGTH

SMALL = {
    "kivi": {"group_size": 32, "residual_length": 64},
    "ott": {"group_size": 32, "residual_length": 16},
    # Its window in 8 bits has tests of its own (test_ott_plus.py); here what is kept is kept exactly.
    "ott+": {"group_size": 32, "residual_length": 16, "quantized_residual": False},
    "polar_pairs": {"group_size": 32, "residual_length": 64},
    "qjl": {"group_size": 32, "residual_length": 64},
    "none": {},
}
FLOOR_DB = {2: (15, 7), 3: (22, 14), 4: (29, 20), 8: (53, 45)}
"""Signal to error of what is read back, keys and values, by bits: about 1 dB under what these random tokens give."""
AFFINE = [name for name in scheme_names() if isinstance(get_scheme(name), AffineScheme)]


def config(scheme: str, bits: int | None = None, **options):
    return make_config(scheme, bits, **{**SMALL.get(scheme, {}), **options}).at_layer(5)


def filled(
    scheme, length, sizes=None, *, bits=None, heads=2, head_dim=32, batch_size=1, dtype=torch.float32, **options
):
    """Return a store with `length` tokens, and those tokens."""
    key, value = (random_tokens(batch_size, heads, length, head_dim, dtype) for _ in range(2))
    store = Store(config(scheme, bits, **options), batch_size, heads, head_dim, length + 150, dtype)
    store.append_in_chunks(key, value, sizes or [length])
    return store, key, value


def assert_kept(scheme, role, got, expected):
    """What is kept is kept exactly; what is stored rotated, up to the rounding of rotations."""
    rotated = {"ott+": ("value",), "turbo": ROLES, "polar": ROLES}.get(scheme, ())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if role in rotated else 0)


BASIC_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("scheme", scheme_names())
@pytest.mark.parametrize(
    ("q_len", "checks"),
    [
        pytest.param(1, BASIC_CHECKS, id="one"),
        pytest.param(40, BASIC_CHECKS, id="chunk"),
        pytest.param(40, "test_aot_dispatch_dynamic", id="chunk-aot", marks=pytest.mark.slow),
    ],
)
def test_ops_pass_opcheck(scheme, q_len, checks):
    store, key, value = filled(scheme, 150)
    new_key, new_value = key[:, :, :q_len].clone(), value[:, :, :q_len].clone()
    query = torch.randn(1, 4, q_len, 32)
    mask = torch.ones(1, 1, q_len, 150 + q_len, dtype=torch.bool).tril(150)
    common = (mask, store.lengths(), 1)
    operands = (new_key, new_value, *common, *store.tail_operands())
    torch.library.opcheck(store.scheme.append_op, operands, test_utils=checks)
    operands = (query, new_key, new_value, *common, 150, 0.2, *store.tail_operands())
    torch.library.opcheck(store.scheme.attend_op, operands, test_utils=checks)


@pytest.mark.parametrize("scheme", scheme_names())
def test_attend_leaves_the_state_alone_and_append_writes_what_it_declares(scheme):
    store, key, value = filled(scheme, 100)
    before = {name: tensor.clone() for role in ROLES for name, tensor in store.state[role].items()}
    store.attend(torch.randn(1, 4, 1, 32), key[:, :, :1], value[:, :, :1])
    assert all(torch.equal(before[name], tensor) for role in ROLES for name, tensor in store.state[role].items())
    schema = get_scheme(scheme).append_op._schema
    mutated = {argument.name for argument in schema.arguments if argument.is_write}
    assert mutated == {name for role in ROLES for name in store.state[role]}
    names = [argument.name for argument in schema.arguments]
    assert names[5 : 5 + len(before)] == list(before), "operands come in the order of state_spec"


@pytest.mark.parametrize("scheme", scheme_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_appending_in_chunks_equals_appending_at_once(scheme, dtype):
    key, value = (random_tokens(2, 3, 290, 16, dtype) for _ in range(2))
    valid = torch.ones(2, 290, dtype=torch.bool)
    valid[1, :37] = False
    stores = []
    for sizes in ([290], [90, *[1] * 70, 129, 1], [1, 31, 33, 225]):
        store = Store(config(scheme), 2, 3, 16, 290, dtype)
        store.append_in_chunks(key, value, sizes, valid)
        stores.append(store)
    assert state_difference(stores[0], stores[1]) == []
    assert state_difference(stores[0], stores[2]) == []


def test_lossless_storage_reads_back_exactly():
    store, key, value = filled("none", 300, [250, 1, 49])
    assert torch.equal(store.read("key"), key)
    assert torch.equal(store.read("value"), value)


@pytest.mark.parametrize("scheme", AFFINE)
@pytest.mark.parametrize("bits", FLOOR_DB)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_what_is_read_back_is_close(scheme, bits, head_dim):
    store, key, value = filled(scheme, 200, bits=bits, head_dim=head_dim, heads=3)
    for role, exact, floor_db in zip(ROLES, (key, value), FLOOR_DB[bits], strict=True):
        read = store.read(role)
        assert read.shape == exact.shape
        packed = store.packed[role]
        assert 96 <= packed <= 192
        error = (read - exact)[:, :, :packed].square().mean()
        # One scale for all channels of a rotated token takes no advantage of where its channels lie.
        floor_db -= 3 if scheme == "ott+" and role == "value" else 0
        assert 10 * math.log10(exact[:, :, :packed].square().mean() / error) > floor_db
        assert_kept(scheme, role, read[:, :, packed:], exact[:, :, packed:])


def test_more_bits_are_never_worse():
    for scheme in AFFINE:
        errors = []
        for bits in (2, 3, 4, 8):
            torch.manual_seed(1)
            store, key, _ = filled(scheme, 200, bits=bits)
            errors.append((store.read("key") - key).square().mean().item())
        assert errors == sorted(errors, reverse=True), scheme


@pytest.mark.parametrize("heads", [(9, 3), (8, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("scheme", scheme_names())
def test_attention_equals_dense_attention_over_what_is_read(scheme, heads):
    num_heads, num_kv_heads = heads
    for past, q_len in ((70, 1), (200, 1), (260, 5), (40, 70)):
        store, key, value = filled(scheme, past, heads=num_kv_heads, batch_size=2, sizes=[past - 30, 29, 1])
        query = torch.randn(2, num_heads, q_len, 32)
        new_key, new_value = torch.randn(2, num_kv_heads, q_len, 32), torch.randn(2, num_kv_heads, q_len, 32)
        mask = torch.ones(2, 1, q_len, past + q_len, dtype=torch.bool).tril(past)
        mask[1, :, :, :11] = False
        expected = dense_attention(store, query, new_key, new_value, mask)
        for spelling in (
            mask,
            torch.where(mask, 0.0, torch.finfo(torch.float32).min),
            mask.expand(2, num_heads, -1, -1),
        ):
            result = store.attend(query, new_key, new_value, spelling)
            torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)


def dense_attention(store, query, new_key, new_value, mask):
    """Attention over what `read` gives; keys that are packed before their values are read from the window."""
    full_key = torch.cat([store.read("key"), new_key], dim=2)
    full_value = torch.cat([store.read("value"), new_value], dim=2)
    return F.scaled_dot_product_attention(query, full_key, full_value, mask, scale=0.125, enable_gqa=True)


@pytest.mark.parametrize("scheme", scheme_names())
def test_without_a_mask_every_query_sees_every_token(scheme):
    store, key, value = filled(scheme, 130)
    query = torch.randn(1, 2, 3, 32)
    everything = torch.ones(1, 1, 3, 133, dtype=torch.bool)
    one = store.attend(query, key[:, :, :3], value[:, :, :3], None)
    torch.testing.assert_close(one, store.attend(query, key[:, :, :3], value[:, :, :3], everything))


@pytest.mark.parametrize("scheme", scheme_names())
def test_attention_finds_the_length_itself(scheme):
    # As in a recorded step: one number for all lengths, and a mask whose columns behind the tokens mean nothing.
    store, key, value = filled(scheme, 150)
    query, capacity = torch.randn(1, 4, 2, 32), store.shape.pages * PAGE
    mask = torch.rand(1, 1, 2, capacity) > 0.3
    mask[..., 150:152] = torch.ones(2, 2, dtype=torch.bool).tril()
    new = key[:, :, :2], value[:, :, :2]
    result = store.scheme.attend_op(query, *new, mask, store.lengths(), 1, ANY_LENGTH, 0.125, *store.tail_operands())
    torch.testing.assert_close(result, store.attend(query, *new, mask[..., :152]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", [*AFFINE, "none"])
@pytest.mark.parametrize("past", [1, 31, 32, 63, 64, 65, 96, 127, 128, 129, 193])
def test_every_token_counts_exactly_once(scheme, past):
    # Zero queries weigh all tokens alike, and token t's value is 1 in channel t % 16 only.
    key = random_tokens(1, 2, past + 1, 16)
    value = torch.zeros(1, 2, past + 1, 16)
    value[:, :, torch.arange(past + 1), torch.arange(past + 1) % 16] = 1.0
    options = {} if scheme == "none" else {"bits": 8}
    store = Store(config(scheme, **options), 1, 2, 16, past + 1)
    store.append_in_chunks(key[:, :, :past], value[:, :, :past], [past])
    result = store.attend(torch.zeros(1, 2, 1, 16), key[:, :, past:], value[:, :, past:])
    share = torch.bincount(torch.arange(past + 1) % 16, minlength=16) / (past + 1)
    # 8-bit codes of 0 and 1 are off by 255 * (fp16 error of 1/255).
    torch.testing.assert_close(result, share.expand_as(result), atol=2e-3 / 16, rtol=2e-3)


def test_unmasked_outliers_count_twice_by_choice():
    key, value = torch.rand(1, 1, 65, 16), torch.ones(1, 1, 65, 16)
    value[:, :, 64:] = 0.0
    weights = []
    for mask_replaced in (True, False):
        store = Store(config("ott", mask_replaced=mask_replaced, bits=8), 1, 1, 16, 80)
        store.append(key[:, :, :64], value[:, :, :64])
        weights.append(store.attend(torch.zeros(1, 1, 1, 16), key[:, :, 64:], value[:, :, 64:])[0, 0, 0, 0].item())
    assert weights == pytest.approx([64 / 65, 67 / 68], abs=1e-4)


@pytest.mark.parametrize("scheme", AFFINE)
def test_a_query_that_may_see_nothing_gets_zero(scheme):
    store, key, value = filled(scheme, 100)
    mask = torch.zeros(1, 1, 1, 101, dtype=torch.bool)
    assert store.attend(torch.randn(1, 2, 1, 32), key[:, :, :1], value[:, :, :1], mask).count_nonzero() == 0


@pytest.mark.parametrize("scheme", AFFINE)
def test_pool_and_window_junk_never_leaks(scheme):
    # What is in rows that hold no token must not matter, whatever it is.
    store, key, value = filled(scheme, 10)
    for role in ROLES:
        for name, tensor in store.state[role].items():
            if name.startswith("outlier_") and tensor.is_floating_point():
                tensor.fill_(float("nan"))
        store.state[role][f"{role}_residual"][:, :, 10:] = float("inf")
    result = store.attend(torch.randn(1, 2, 1, 32), key[:, :, :1], value[:, :, :1])
    assert result.isfinite().all()


@pytest.mark.parametrize("scheme", scheme_names())
@pytest.mark.parametrize("length", [0, 1, 33, 96, 97, 130, 150, 159, 170, 199])
def test_rewinding_then_appending_again(scheme, length):
    store, key, value = filled(scheme, 200, [120, *[1] * 10, 70], head_dim=16)
    before = {role: store.read(role) for role in ROLES}
    packed_before = store.packed
    store.crop(length)
    assert store.packed["value"] <= store.packed["key"] <= length or scheme == "none"
    for role, exact in zip(ROLES, (key, value), strict=True):
        expected = before[role][:, :, :length].clone()
        if scheme in ("ott", "ott+", "polar_pairs", "qjl"):
            back = slice(max(store.packed[role], 200 - store.scheme.ring_rows(store.config)), length)
            expected[:, :, back] = exact[:, :, back]
        assert_kept(scheme, role, store.read(role), expected)
    if length >= max(packed_before.values()):
        assert store.packed == packed_before
    again = random_tokens(1, 2, 150, 16)
    for part in again.split([1, 1, 60, 88], dim=2):
        query = torch.randn(1, 4, part.shape[2], 16)
        expected = dense_attention(store, query, part, part, None)
        torch.testing.assert_close(store.attend(query, part, part), expected, atol=2e-5, rtol=2e-5)
        store.append(part, part)
    # What was packed stays as it was, and the new tokens' window is exact.
    kept = min(*packed_before.values(), length // 32 * 32)
    assert_kept(scheme, "value", store.read("value")[:, :, :kept], before["value"][:, :, :kept])
    window = min(150 - max(0, store.packed["value"] - length), 16)
    newest = slice(store.length - window, store.length)
    assert_kept(scheme, "value", store.read("value")[:, :, newest], again[:, :, 150 - window :])
    if scheme == "ott":
        pool, spill = store.pool_positions(0, 0)
        assert not pool & spill
        assert max(pool, default=-1) < store.packed["key"]
        used = store.state["key"]["outlier_position"][0, 0, 3:] >= 0
        assert used.sum() == store.state["key"]["spill_count"][0, 0]
        assert used.long().diff().max() <= 0, "the spill pool has no holes"


@pytest.mark.parametrize("scheme", scheme_names())
@pytest.mark.parametrize("length", [1, 40, 70, 170])
def test_a_token_that_is_never_counted_leaves_no_trace_unless_a_group_is_due(scheme, length):
    # A step that is launched ahead in vain (ottfx/launch_ahead.py).
    store, _, _ = filled(scheme, length, head_dim=16)
    due = [
        store.scheme.packed_length(store.config, role, length + 1, packed) != packed
        for role, packed in store.packed.items()
    ]
    if any(due):
        pytest.skip("such a step is never launched ahead")
    twin = copy.deepcopy(store)
    junk, key, value = (random_tokens(1, 2, 1, 16) for _ in range(3))
    store.scheme.append_op(1e3 * junk, junk, None, store.lengths(), 1, *store.tail_operands())
    for half in store.halves.values():
        half.overwrite(length + 1)
    for role in ROLES:
        assert torch.equal(store.read(role), twin.read(role))
    for each in (store, twin):
        each.append(key, value)
    assert state_difference(store, twin) == []
    cut = max(length - 20, 0)
    for each in (store, twin):
        each.crop(cut)
    for role in ROLES:
        assert torch.equal(store.read(role), twin.read(role))


@pytest.mark.parametrize("scheme", scheme_names())
def test_lengths_and_sizes_follow_from_the_config(scheme):
    settings, implementation = config(scheme), get_scheme(scheme)
    store = Store(settings, 2, 3, 64, 500)
    for role in ROLES:
        specs = implementation.state_spec(settings, role, store.shape)
        bigger = implementation.state_spec(
            settings, role, dataclasses.replace(store.shape, pages=store.shape.pages + 3)
        )
        for name, spec in specs.items():
            assert spec.shape[0] == 2
            grown = list(spec.shape)
            if spec.paged_dim is not None:
                grown[spec.paged_dim] += spec.shape[spec.paged_dim] // store.shape.pages * 3
            assert list(bigger[name].shape) == grown
    assert implementation.pages_needed(settings, 0) == 1
    assert implementation.pages_needed(settings, PAGE) == 1
    assert implementation.pages_needed(settings, PAGE + 1) == 2


def test_packed_bytes_are_the_published_bits():
    store = Store(make_config("ott", 2).at_layer(5), 1, 1, 128, 1024, torch.float16)
    for role in ROLES:
        paged = ("codes", "scale", "zero_point")
        bits = sum(store.state[role][f"{role}_{name}"].nbytes for name in paged) * 8
        assert bits / (store.shape.pages * PAGE * 128) == 2 + 32 / 128
    store = Store(make_config("kivi", 4).at_layer(5), 1, 1, 128, 1024, torch.float16)
    bits = sum(store.state["value"][f"value_{name}"].nbytes for name in ("codes", "scale", "zero_point")) * 8
    assert bits / (store.shape.pages * PAGE * 128) == 4 + 32 / 32


def test_kivi_packs_keys_all_at_once_and_shows_them_quantized():
    store, key, value = filled("kivi", 63, bits=2)
    assert store.packed == {"key": 0, "value": 0}
    store.append(key[:, :, :1], value[:, :, :1])
    assert store.packed == {"key": 64, "value": 0}
    ring = store.state["key"]["key_residual"]
    assert torch.equal(ring, store.read("key"))
    assert not torch.equal(ring[:, :, :63], key)
    assert torch.equal(store.read("value")[:, :, :63], value)
