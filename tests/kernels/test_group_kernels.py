"""The kernels of schemes that store keys by groups in codes of their own give what their definitions give."""

import math
from dataclasses import dataclass

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from ottfx.affine_cache import token_validity  # noqa: E402
from ottfx.kernels.group_attend import attend_pairs, attend_sketch  # noqa: E402
from ottfx.kernels.pair_append import append as append_pairs  # noqa: E402
from ottfx.kernels.pairs import angle_of, unit_vector  # noqa: E402
from ottfx.kernels.sketch import sketch  # noqa: E402
from ottfx.kernels.sketch_append import append as append_sketch  # noqa: E402
from ottfx.registry import make_config  # noqa: E402
from ottfx.rotation import seed_offset  # noqa: E402
from ottfx.sketch_codes import SEEDS  # noqa: E402
from ottfx.sketch_codes import sketch as defined_sketch  # noqa: E402
from tests.kernels.test_token_kernels import same_codes  # noqa: E402
from tests.schemes.scheme_store import ROLES, Store, random_tokens  # noqa: E402
from tests.tolerances import ATTENTION_ERROR, DIFFERENT_CODE_SHARE, FP16_ULP  # noqa: E402

HALF, FLOAT = torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    options: tuple = (("group_size", 32), ("residual_length", 32))
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    past: int = 150
    dtype: torch.dtype = FLOAT
    scheme: str = "polar_pairs"

    def __str__(self):
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(type(self), k, None)]
        return "-".join(changed).replace("torch.", "") or "default"

    def draw(self, q_len):
        # [batch, q_len, heads, head_dim] as projections leave it, seen as [batch, heads, q_len, head_dim].
        return [
            random_tokens(self.batch, q_len, heads, self.head_dim, self.dtype).transpose(1, 2)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def store(self):
        config = make_config(self.scheme, **dict(self.options)).at_layer(20)
        return Store(config, self.batch, self.kv_heads, self.head_dim, self.past + 300, self.dtype)


def state_on(store, device):
    return {name: tensor.clone().to(device) for role in ROLES for name, tensor in store.state[role].items()}


def constants_of(store):
    """What launchers take behind the state."""
    constants = store.scheme.constants(store.config)
    if store.scheme.name == "polar_pairs":
        return constants[:-1]
    key_bits, _, value_bits, group_size, _, seed = constants
    return key_bits, value_bits, group_size, seed_offset(seed * SEEDS)


def run_append(store, key, value, valid, device):
    """State after an append by the kernels, by name."""
    state = state_on(store, device)
    valid = None if valid is None else valid.to(device)
    append = append_pairs if store.scheme.name == "polar_pairs" else append_sketch
    lengths = store.lengths()[1:].to(device)
    append(key.to(device), value.to(device), valid, lengths, *state.values(), *constants_of(store))
    return {name: tensor.cpu() for name, tensor in state.items()}


def run_attend(store, query, key, value, mask, device):
    state = [tensor for name, tensor in state_on(store, device).items() if name != "residual_valid"]
    tensors = [tensor.to(device) for tensor in (query, key, value)]
    mask = None if mask is None else mask.to(device)
    attend = attend_pairs if store.scheme.name == "polar_pairs" else attend_sketch
    return attend(*tensors, mask, store.lengths()[1:].to(device), 0.3, *state, *constants_of(store)).cpu()


def options(**given):
    return tuple(given.items())


APPEND = [
    # A prompt that packs several groups, a step that makes a group due, one that does not.
    (Case(past=0), 75, "padded"),
    (Case(options(group_size=32, residual_length=64, key_bits=3), past=127, head_dim=16, kv_heads=2), 1, "all"),
    (Case(options(group_size=32, residual_length=32, radius_bits=2, angle_bits=3), head_dim=80, dtype=HALF), 20, "all"),
    (Case(batch=2, past=40), 3, "padded"),
    (Case(options(group_size=64, residual_length=128, value_bits=4, value_group_size=16), dtype=HALF), 110, "padded"),
    (Case(options(group_size=32, residual_length=32, seed=2), past=0, scheme="qjl"), 75, "padded"),
    (
        Case(options(group_size=64, residual_length=64, key_bits=3, outlier_channels=3), 2, 2, 2, 16, 60, HALF, "qjl"),
        5,
        "all",
    ),
]
ATTEND = [
    (Case(batch=2, heads=4, kv_heads=2, past=140, dtype=HALF), 1, "bool"),
    (Case(options(group_size=32, residual_length=32, key_bits=3), head_dim=80, heads=3, past=100), 2, "causal"),
    (Case(options(group_size=64, residual_length=64, radius_bits=2, value_bits=3), past=90, head_dim=16), 1, "float"),
    (Case(past=0, head_dim=16), 20, "causal"),
    (Case(options(group_size=128, residual_length=128), past=128, heads=1, head_dim=64), 1, "none"),
    (Case(options(group_size=32, residual_length=32), 2, 4, 2, 32, 80, HALF, "qjl"), 1, "bool"),
    (Case(options(group_size=64, residual_length=64, key_bits=3, seed=5), 1, 2, 1, 16, 70, FLOAT, "qjl"), 2, "causal"),
]
LARGE = [
    (Case(given, 3, heads, 4, head_dim, 1500, dtype), n, kind)
    for given, head_dim, dtype in (
        (options(), 128, torch.bfloat16),
        (options(key_bits=3, group_size=64, residual_length=64), 256, HALF),
        (options(radius_bits=2, group_size=32), 80, FLOAT),
    )
    for heads, n, kind in ((4, 1, "none"), (32, 1, "bool"), (8, 150, "causal"))
] + [
    (Case(given, 3, heads, 4, head_dim, 1500, dtype, "qjl"), n, kind)
    for given, head_dim, dtype in (
        (options(), 128, torch.bfloat16),
        (options(key_bits=4, group_size=64), 256, HALF),
        (options(key_bits=3, seed=7), 64, FLOAT),
    )
    for heads, n, kind in ((4, 1, "none"), (32, 1, "bool"), (8, 150, "causal"))
]


def check_append(case, q_len, padding, device):
    store = case.store()
    if case.past:
        store.append(*case.draw(case.past)[1:])
    _, key, value = case.draw(q_len)
    mask = None
    if padding == "padded":
        mask = torch.rand(case.batch, 1, 1, case.past + q_len) > 0.3
        if q_len > 70:
            # A group without a real token.
            mask[:, :, :, case.past : case.past + 32] = False
    valid = token_validity(mask, store.lengths(), 1, q_len, case.batch)
    got = run_append(store, key, value, valid, device)
    before = state_on(store, "cpu")
    store.append(key, value, mask)
    for role in ROLES:
        for name, tensor in store.state[role].items():
            assert got[name].dtype == tensor.dtype
            if tensor.dtype == torch.int32 or name == "key_outliers":
                assert same_codes(got[name], tensor) >= 1 - DIFFERENT_CODE_SHARE, name
            elif "residual" in name:
                assert torch.equal(got[name], tensor), name
            else:
                torch.testing.assert_close(got[name], tensor, rtol=2 * FP16_ULP, atol=0)
    assert not torch.equal(got["key_residual"], before["key_residual"])
    codes = next(iter(got))
    assert torch.equal(got[codes], before[codes]) == (
        store.packed["key"] == case.past // store.config.residual_length * store.config.residual_length
    )


@pytest.mark.parametrize("case, q_len, padding", APPEND, ids=str)
def test_append_stores_what_the_definition_stores(case, q_len, padding, kernel_device):
    check_append(case, q_len, padding, kernel_device)


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
    got = run_attend(store, query, key, value, mask, device)
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
    check_append(case, q_len, "padded" if q_len > 1 else "all", kernel_device)
    check_attend(case, q_len, kind, kernel_device)


@pytest.mark.parametrize("scheme", ["polar_pairs", "qjl"])
def test_slots_without_a_token_and_hidden_rows(scheme, kernel_device):
    case = Case(past=70, scheme=scheme)
    store = case.store()
    store.append(*case.draw(case.past)[1:])
    query, key, value = case.draw(2)
    mask = torch.ones(1, 1, 2, 72, dtype=torch.bool)
    mask[:, :, 1] = False
    before = run_attend(store, query, key, value, mask, kernel_device)
    for role in ROLES:
        store.state[role][f"{role}_residual"][:, :, 6:] = torch.nan
        for name, tensor in store.state[role].items():
            if "residual" not in name:
                tensor[:, :, 1:] = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    after = run_attend(store, query, key, value, mask, kernel_device)
    assert torch.equal(before, after)
    assert before[:, :, 0].abs().min() > 0 and not before[:, :, 1].any()


@triton.jit
def _angles_kernel(first_ptr, second_ptr, angle_ptr, cosine_ptr, sine_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    angle = angle_of(tl.load(first_ptr + place), tl.load(second_ptr + place))
    cosine, sine = unit_vector(angle)
    tl.store(angle_ptr + place, angle)
    tl.store(cosine_ptr + place, cosine)
    tl.store(sine_ptr + place, sine)


def test_series_are_those_of_the_functions(kernel_device):
    turn = torch.linspace(0, 2 * math.pi, 1016, dtype=torch.float64)
    first, second = turn.cos(), turn.sin()
    corners = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1], [0, 0], [1, 1], [1e-20, 1e-20], [-60000, 1e-7]])
    first, second = torch.cat([first, corners[:, 0]]), torch.cat([second, corners[:, 1]])
    first, second = first.float().to(kernel_device), second.float().to(kernel_device)
    angle, cosine, sine = (torch.empty_like(first) for _ in range(3))
    _angles_kernel[(1,)](first, second, angle, cosine, sine, 1024)
    wanted = torch.atan2(second.double(), first.double()) % (2 * math.pi)
    assert (angle - wanted).abs().max() < 1e-6
    assert (cosine - angle.double().cos()).abs().max() < 1e-6
    assert (sine - angle.double().sin()).abs().max() < 1e-6


@pytest.mark.parametrize(("head_dim", "key_bits"), [(16, 3), (64, 2)])
def test_sketch_is_that_of_the_definition(head_dim, key_bits, kernel_device):
    got = sketch(head_dim, key_bits, FLOAT, kernel_device, seed_offset(9 * SEEDS)).cpu()
    torch.testing.assert_close(got, defined_sketch(head_dim, key_bits, torch.device("cpu"), 9), atol=1e-5, rtol=1e-5)
