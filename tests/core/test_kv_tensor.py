"""KVTensor as a tensor: shape, native operations, branches, and everything that must not go wrong in silence."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor

from ottfx.cache_state import CacheHalf, Payload
from ottfx.errors import CacheError
from ottfx.kv_tensor import DenseFallbackWarning, KVTensor
from ottfx.registry import get_scheme, make_config
from ottfx.schemes.base import CacheShape

B, H, D = 2, 3, 16


def handles(length: int = 200, scheme: str = "none", **options) -> tuple[KVTensor, KVTensor, Tensor, Tensor]:
    """Key and value handles of `length` stored tokens, and the dense tensors that were stored."""
    config = make_config(scheme, **options).at_layer(5)
    implementation = get_scheme(scheme)
    pages = implementation.pages_needed(config, length) + 1
    shape = CacheShape(
        batch_size=B, num_kv_heads=H, head_dim=D, pages=pages, dtype=torch.float32, device=torch.device("cpu")
    )
    halves = [CacheHalf.allocate(implementation, config, role, shape) for role in ("key", "value")]
    key, value = torch.randn(2, B, H, length, D)
    state = [t for half in halves for t in half.tensors.values()]
    implementation.append_op(
        key, value, None, torch.zeros(1, 3, dtype=torch.int64), 0, *state, *implementation.constants(config)
    )
    for half in halves:
        half.advance(length)
    made = [KVTensor.from_payload(Payload(half, length)) for half in halves]
    return made[0], made[1], key, value


def test_looks_like_the_dense_cache():
    key, _, dense, _ = handles()
    assert key.shape == (B, H, 200, D)
    assert key.dtype == torch.float32 and key.device.type == "cpu"
    assert key.numel() == dense.numel()
    assert "length" not in repr(key) and "none" in repr(key)
    torch.testing.assert_close(key.dequantize(), dense)


@pytest.mark.parametrize("scheme", ["none", "kivi", "ott"])
def test_append_crop_and_select_are_native(scheme):
    key, value, *_ = handles(scheme=scheme)
    new = torch.randn(B, H, 3, D)
    for handle in (key, value):
        dense = handle.dequantize()
        with warnings.catch_warnings():
            warnings.simplefilter("error", DenseFallbackWarning)
            longer = torch.cat([handle, new], dim=-2)
            cropped = handle[..., :150, :]
            rows = torch.tensor([1, 0, 1])
            selected, fancy = handle.index_select(0, rows), handle[rows, ...]
            repeated = handle.repeat_interleave(2, dim=0)
            first = handle[:1]
            moved = handle.to("cpu", copy=True)
            cloned, copied, detached = handle.clone(), copy.deepcopy(handle), handle.detach()
            narrowed = handle.narrow(2, 0, 7)
            parts = handle.split(1, dim=0)
            joined = torch.cat([handle, selected], dim=0)
        expected = {
            longer: torch.cat([dense, new], dim=2),
            cropped: dense[:, :, :150],
            selected: dense[rows],
            fancy: dense[rows],
            repeated: dense.repeat_interleave(2, dim=0),
            first: dense[:1],
            moved: dense,
            cloned: dense,
            copied: dense,
            detached: dense,
            narrowed: dense[:, :, :7],
            parts[1]: dense[1:],
            joined: torch.cat([dense, dense[rows]]),
        }
        for got, want in expected.items():
            assert type(got) is KVTensor
            assert got.shape == want.shape
            assert got._base is None
            torch.testing.assert_close(got.dequantize(), want, rtol=0, atol=1e-6)


def test_other_operations_are_dense_right_and_warned_once():
    key, *_ = handles()
    dense = key.dequantize()
    import ottfx.kv_tensor

    ottfx.kv_tensor._warned.clear()
    with pytest.warns(DenseFallbackWarning, match="dequantized"):
        total = key + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = key + 1
    assert type(total) is Tensor and type(again) is Tensor
    torch.testing.assert_close(total, dense + 1)
    with pytest.warns(DenseFallbackWarning):
        torch.testing.assert_close(key[:, :, 5:9], dense[:, :, 5:9])
    with pytest.warns(DenseFallbackWarning):
        torch.testing.assert_close(key.to(torch.float16), dense.half())


@pytest.mark.parametrize(
    "write",
    [
        lambda k: k.zero_(),
        lambda k: k.mul_(2),
        lambda k: k.copy_(torch.zeros(B, H, 200, D)),
        lambda k: k.__setitem__((slice(None), slice(None), 0), 0),
        lambda k: torch.add(torch.zeros(B, H, 200, D), 1, out=k),
        lambda k: setattr(k, "data", torch.zeros(B, H, 200, D)),
        lambda k: k.index_copy_(2, torch.tensor([0]), torch.zeros(B, H, 1, D)),
        lambda k: k.masked_fill_(torch.zeros(1, dtype=torch.bool), 0.0),
    ],
    ids=["zero_", "mul_", "copy_", "setitem", "out", "data", "index_copy_", "masked_fill_"],
)
def test_writing_raises(write):
    key, _, dense, _ = handles()
    with pytest.raises(CacheError, match="only appends"):
        write(key)
    torch.testing.assert_close(key.dequantize(), dense)


def test_pickle_says_what_to_do():
    key, *_ = handles()
    with pytest.raises(CacheError, match=r"ottfx\.save_cache.*ottfx\.load_cache"):
        pickle.dumps(key)
    with pytest.raises(CacheError, match=r"ottfx\.save_cache"):
        torch.save(key, io.BytesIO())


def append(key: KVTensor, value: KVTensor, new: Tensor) -> tuple[KVTensor, KVTensor]:
    """What a compiled step does: pack `new` behind both handles."""
    from ottfx.cache_call import CacheCall, SiteCall, StateInput

    half = key.payload.half
    halves = {"key": half, "value": value.payload.half}
    names = [StateInput(kind="state", role=role, name=name) for role, h in halves.items() for name in h.tensors]
    site = SiteCall(
        name="test", scheme=half.scheme, config=half.config, num_kv_heads=H, head_dim=D, dtype=torch.float32,
        device=torch.device("cpu"), past=(0, 1), batch_size=lambda args: B, q_len=lambda args: new.shape[2],
    )  # fmt: skip

    def inner(lengths, *state):
        half.scheme.append_op(new, new, None, lengths[:, :3], 0, *state, *half.scheme.constants(half.config))
        return ()

    call = CacheCall(inner, [site], [], [StateInput(kind="lengths"), *names], 2, {0: (0, "key"), 1: (0, "value")})
    return call(key, value)


@pytest.mark.parametrize("scheme", ["none", "ott"])
def test_branches_do_not_disturb_each_other(scheme):
    key, value, *_ = handles(scheme=scheme)
    alias, alias_value = key.detach(), value.detach()
    a, b, c = (torch.randn(B, H, 1, D) for _ in range(3))
    before = key.dequantize()
    one, one_value = append(key, value, a)
    two, two_value = append(alias, alias_value, b)
    three, _ = append(one, one_value, c)
    for handle, news in ((one, [a]), (two, [b]), (three, [a, c])):
        torch.testing.assert_close(handle.dequantize(), torch.cat([before, *news], dim=2))
    assert one.payload.half is three.payload.half, "the longest handle appends in place"
    assert two.payload.half is not one.payload.half, "a branch copies once"
    torch.testing.assert_close(two_value.dequantize()[:, :, -1:], b)


def test_append_after_crop_forgets_what_was_cropped():
    key, value, dense, _ = handles()
    half = key.payload.half
    key, value = key[:, :, :150], value[:, :, :150]
    new = torch.randn(B, H, 1, D)
    longer, _ = append(key, value, new)
    torch.testing.assert_close(longer.dequantize(), torch.cat([dense[:, :, :150], new], dim=2))
    assert longer.payload.half is half, "nobody else looks: no copy"


def test_eager_tail_is_packed_by_the_next_step():
    key, value, *_ = handles(scheme="kivi", length=100)
    tail = torch.randn(B, H, 300, D)
    longer, longer_value = torch.cat([key, tail], dim=2), torch.cat([value, tail], dim=2)
    assert longer.payload.tail is not None
    packed, _ = append(longer, longer_value, torch.randn(B, H, 1, D))
    assert packed.payload.tail is None and packed.shape[2] == 401
    assert packed.payload.half.packed == 384
    error = (packed.dequantize()[:, :, 100:400] - tail).abs().max()
    assert error < 2.0, "two-bit codes of standard normal values"


def test_keys_and_values_of_different_lengths_are_refused():
    key, value, *_ = handles()
    with pytest.raises(CacheError, match="same length"):
        append(key[:, :, :150], value, torch.randn(B, H, 1, D))


def test_tensors_made_in_inference_mode_can_be_continued_outside():
    with torch.inference_mode():
        key, value, *_ = handles(scheme="kivi")
    with torch.no_grad():
        longer, _ = append(key, value, torch.randn(B, H, 1, D))
    assert longer.shape[2] == 201


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_compiler_gets_right_values(backend):
    key, _, dense, _ = handles()

    def total(k):
        return (k * 2).sum()

    def lengthen(k, new):
        return torch.cat([k, new], dim=2)

    torch._dynamo.config.error_on_recompile = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseFallbackWarning)
        result = torch.compile(total, backend=backend)(key)
        torch.testing.assert_close(result, (dense * 2).sum())
        new = torch.randn(B, H, 2, D)
        longer = torch.compile(lengthen, backend=backend)(key, new)
    assert type(longer) is KVTensor, "another compiler does not turn the cache dense"
    torch.testing.assert_close(longer.dequantize(), torch.cat([dense, new], dim=2))


def test_a_lost_append_is_an_error_not_a_wrong_value():
    key, *_ = handles()
    lost = KVTensor.__tensor_unflatten__({"anchor": key.anchor}, key.config, (B, H, 201, D), ())
    with pytest.raises(CacheError, match="201 tokens"):
        lost.dequantize()
    gone = KVTensor(torch.empty(B, H, 0, D), 3)
    with pytest.raises(CacheError, match="content"):
        gone.dequantize()
