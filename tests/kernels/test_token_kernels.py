"""The kernels of schemes that store by tokens give what their plain-torch definitions give."""

from dataclasses import dataclass

import pytest
import torch

from ottfx import polar_codes
from ottfx.kernels.polar_append import append as append_polar
from ottfx.kernels.rotate import rotate
from ottfx.kernels.token_attend import attend_polar, attend_turbo
from ottfx.kernels.turbo_append import append as append_turbo
from ottfx.lloyd_max import sphere_magnitudes
from ottfx.registry import make_config
from ottfx.rotation import rotation, seed_offset
from tests.schemes.scheme_store import ROLES, Store, random_tokens
from tests.tolerances import ATTENTION_ERROR, DIFFERENT_CODE_SHARE, FP16_ULP

HALF, FLOAT = torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    scheme: str
    options: tuple = ()
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    past: int = 150
    dtype: torch.dtype = FLOAT

    def __str__(self):
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(type(self), k, None)]
        return "-".join(changed).replace("torch.", "")

    def config(self):
        return make_config(self.scheme, **dict(self.options))

    def draw(self, q_len):
        # [batch, q_len, heads, head_dim] as projections leave it, seen as [batch, heads, q_len, head_dim].
        return [
            random_tokens(self.batch, q_len, heads, self.head_dim, self.dtype).transpose(1, 2)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def store(self):
        return Store(self.config(), self.batch, self.kv_heads, self.head_dim, self.past + 100, self.dtype)


def operands(case, store, device, tables_of):
    """What launchers take behind the tokens: lengths of the site, a copy of the state, constants, tables, the seed."""
    config = case.config()
    state = [tensor.clone().to(device) for role in ROLES for tensor in store.state[role].values()]
    if case.scheme == "turbo":
        constants = config.widths()
        tables = [sphere_magnitudes(case.head_dim, bits).values for bits in constants]
    else:
        constants = [config.first_bits]
        bits = (config.first_bits, 2, 2, 2)
        tables = [[tables_of(level, width) for level, width in enumerate(bits, 1)]]
    return store.lengths()[1:].to(device), state, constants, [*tables, seed_offset(config.seed)]


def run_append(case, store, key, value, device):
    """State after an append by the kernels, by name."""
    lengths, state, constants, tables = operands(case, store, device, polar_codes.slopes)
    append = append_polar
    if case.scheme == "turbo":
        append, constants = append_turbo, [*constants, case.config().norm_correction]
    append(key.to(device), value.to(device), lengths, *state, *constants, *tables)
    names = [name for role in ROLES for name in store.state[role]]
    return {name: tensor.cpu() for name, tensor in zip(names, state, strict=True)}


def run_attend(case, store, query, key, value, mask, device):
    lengths, state, constants, tables = operands(case, store, device, polar_codes.cosines)
    tensors = [tensor.to(device) for tensor in (query, key, value)]
    mask = None if mask is None else mask.to(device)
    attend = attend_turbo if case.scheme == "turbo" else attend_polar
    return attend(*tensors, mask, lengths, 0.3, *state, *constants, *tables).cpu()


APPEND = [
    (Case("turbo"), 5),
    (Case("turbo", (("bits", 3),), head_dim=80, past=0, kv_heads=3), 9),
    (Case("turbo", (("bits", 4), ("seed", 7)), head_dim=16, batch=2, dtype=HALF), 1),
    (Case("turbo", (("key_bits", 4), ("value_bits", 3), ("norm_correction", True)), head_dim=64, dtype=HALF), 40),
    (Case("turbo", (("bits", 2), ("norm_correction", True)), head_dim=96), 3),
    (Case("polar", head_dim=64), 5),
    (Case("polar", (("first_bits", 2),), head_dim=80, past=0, kv_heads=3), 9),
    (Case("polar", (("first_bits", 1), ("seed", 7)), head_dim=16, batch=2, dtype=HALF), 1),
]
ATTEND = [
    (Case("turbo", batch=2, heads=4, kv_heads=2, past=140, dtype=HALF), 1, "bool"),
    (Case("turbo", (("bits", 3),), head_dim=80, heads=3), 2, "causal"),
    (Case("turbo", (("key_bits", 4), ("value_bits", 2), ("seed", 3)), past=90, head_dim=64, dtype=HALF), 1, "float"),
    (Case("turbo", past=0, head_dim=16), 20, "causal"),
    (Case("turbo", past=128, heads=1), 1, "none"),
    (Case("polar", batch=2, heads=4, kv_heads=2, past=140, head_dim=64, dtype=HALF), 1, "bool"),
    (Case("polar", (("first_bits", 2),), head_dim=80, heads=3), 2, "causal"),
    (Case("polar", (("first_bits", 1), ("seed", 3)), past=90, head_dim=16), 1, "float"),
]
LARGE = [
    (Case("turbo", (("bits", bits),), 3, heads, 4, head_dim, 1500, dtype), n, kind)
    for bits, head_dim, dtype in ((2, 128, torch.bfloat16), (3, 128, HALF), (4, 256, HALF), (3, 80, FLOAT))
    for heads, n, kind in ((4, 1, "none"), (32, 1, "bool"), (8, 150, "causal"))
] + [
    (Case("polar", (("first_bits", bits),), 3, heads, 4, head_dim, 1500, dtype), n, kind)
    for bits, head_dim, dtype in ((4, 128, torch.bfloat16), (2, 256, HALF), (1, 80, FLOAT))
    for heads, n, kind in ((4, 1, "none"), (32, 1, "bool"), (8, 150, "causal"))
]


def same_codes(got, expected):
    """Share of codes, here 4-bit pieces of words, that are alike."""
    shift = torch.arange(0, got.element_size() * 8, 4)
    pieces = [(words.unsqueeze(-1).long() >> shift) & 15 for words in (got, expected)]
    return (pieces[0] == pieces[1]).float().mean().item()


def check_append(case, q_len, device):
    store = case.store()
    for size in (case.past, q_len):
        _, key, value = case.draw(size) if size else (None, None, None)
        if size == q_len:
            got = run_append(case, store, key, value, device)
        if size:
            store.append(key, value)
    expected = {name: tensor for role in ROLES for name, tensor in store.state[role].items()}
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        if tensor.is_floating_point():
            torch.testing.assert_close(got[name], tensor, rtol=2 * FP16_ULP, atol=0)
        else:
            assert same_codes(got[name], tensor) >= 1 - DIFFERENT_CODE_SHARE, name
    assert not torch.equal(got["key_codes"], torch.zeros_like(got["key_codes"]))


@pytest.mark.parametrize("case, q_len", APPEND, ids=str)
def test_append_stores_what_the_definition_stores(case, q_len, kernel_device):
    check_append(case, q_len, kernel_device)


def make_mask(kind, case, q_len):
    if kind == "none":
        return None
    causal = torch.arange(case.past + q_len) <= case.past + torch.arange(q_len)[:, None]
    if kind == "causal":
        return causal[None, None]
    padding = torch.rand(case.batch, 1, 1, case.past + q_len) > 0.2
    padding[..., -1] = True
    allowed = causal & padding
    if kind == "bool":
        return allowed.expand(case.batch, case.heads, -1, -1)
    return torch.where(allowed, torch.randn(allowed.shape).to(case.dtype), torch.finfo(case.dtype).min)


def check_attend(case, q_len, kind, device):
    store = case.store()
    if case.past:
        store.append(*case.draw(case.past)[1:])
    query, key, value = case.draw(q_len)
    mask = make_mask(kind, case, q_len)
    got = run_attend(case, store, query, key, value, mask, device)
    expected = store.attend(query, key, value, mask, softmax_scale=0.3)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    # Scores here grow with head_dim, for their factor does not fall, and so does what rounding does to them.
    assert error <= 2 * ATTENTION_ERROR[case.dtype] * max(1.0, case.head_dim / 32) ** 0.5


@pytest.mark.parametrize("case, q_len, kind", ATTEND, ids=str)
def test_attend_gives_what_the_definition_gives(case, q_len, kind, kernel_device):
    check_attend(case, q_len, kind, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("case, q_len, kind", LARGE, ids=str)
def test_kernels_on_long_caches(case, q_len, kind, kernel_device):
    check_append(case, q_len, kernel_device)
    check_attend(case, q_len, kind, kernel_device)


@pytest.mark.parametrize("scheme", ["turbo", "polar"])
def test_slots_without_a_token_and_hidden_rows(scheme, kernel_device):
    case = Case(scheme, past=100)
    store = case.store()
    store.append(*case.draw(case.past)[1:])
    query, key, value = case.draw(2)
    mask = torch.ones(1, 1, 2, 102, dtype=torch.bool)
    mask[:, :, 1] = False
    before = run_attend(case, store, query, key, value, mask, kernel_device)
    for role in ROLES:
        for tensor in store.state[role].values():
            junk = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
            tensor.flatten(2, 3)[:, :, 100:] = junk
    after = run_attend(case, store, query, key, value, mask, kernel_device)
    assert torch.equal(before, after)
    assert before[:, :, 0].abs().min() > 0 and not before[:, :, 1].any()


@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_rotation_by_a_seed(head_dim, kernel_device):
    x = torch.randn(1, 2, 3, head_dim)
    got = rotate(x.to(kernel_device), False, FLOAT, seed_offset(5))
    torch.testing.assert_close(got.cpu(), x @ rotation(head_dim, x.device, 5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(got, True, FLOAT, seed_offset(5)).cpu(), x, atol=1e-5, rtol=1e-5)
