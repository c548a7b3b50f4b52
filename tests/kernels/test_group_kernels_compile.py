"""The kernels of storage by groups compile for compute capability 9.0, and trace without guards, on any machine."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")

from ottfx.kernels.group_append import RING_ROWS, _fill_window_kernel  # noqa: E402
from ottfx.kernels.group_attend import tile_sizes  # noqa: E402
from ottfx.kernels.group_split import _attend_groups_kernel  # noqa: E402
from ottfx.kernels.launch import next_power_of_2  # noqa: E402
from ottfx.kernels.pair_append import _pack_kernel  # noqa: E402
from ottfx.kernels.rotate import BLOCK  # noqa: E402
from ottfx.kernels.sketch import _sketch_kernel  # noqa: E402
from ottfx.kernels.sketch_append import _pack_kernel as _pack_sketch_kernel  # noqa: E402
from ottfx.kernels.sketch_append import pack_warps  # noqa: E402
from tests.kernels import test_compile_for_hopper  # noqa: E402
from tests.kernels.test_compile_for_hopper import compile_kernel, stack_bytes  # noqa: E402
from tests.kernels.test_token_kernels_compile import FEW_WORDS  # noqa: E402
from tests.kernels.test_token_launchers_trace import mutated, trace  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]


@pytest.fixture(autouse=True)
def pointers(monkeypatch):
    types = {"norms": "fp16", "outliers": "u8", "signs": "i32", "outlier_signs": "i32", "radius": "i32", "angle": "i32"}
    types |= dict.fromkeys(("radius_scale", "radius_zero", "angle_scale", "angle_zero"), "fp16")
    for name, kind in types.items():
        monkeypatch.setitem(test_compile_for_hopper.POINTERS, name, kind)
    return monkeypatch


def constants_of(head_dim, bits, group_size):
    radius_bits, angle_bits, value_bits = bits
    return {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "CAPACITY": 128, "GROUP": group_size, "RADIUS_BITS": radius_bits,
        "ANGLE_BITS": angle_bits, "VALUE_BITS": value_bits, "VALUE_GROUPS": max(head_dim // group_size, 1),
    }  # fmt: skip


def sketch_constants_of(head_dim, bits, group_size):
    key_bits, value_bits = bits
    constants = constants_of(head_dim, (0, 0, value_bits), group_size)
    return constants | {"KEY_BITS": key_bits, "OUTLIERS": 8}


@pytest.mark.parametrize(
    "dtype, head_dim, bits, group_size",
    [
        ("bf16", 128, (4, 4, 2), 128),
        pytest.param("fp16", 80, (3, 2, 4), 32, marks=pytest.mark.slow),
        pytest.param("fp32", 256, (4, 4, 2), 64, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_append_compiles_without_spills(dtype, head_dim, bits, group_size, tmp_path):
    constants = constants_of(head_dim, bits, group_size) | {"HAS_VALID": True}
    blocks = {"BLOCK_HALF": next_power_of_2(head_dim // 2), "BLOCK_QUARTER": next_power_of_2(head_dim // 4)}
    assert stack_bytes(compile_kernel(_pack_kernel, constants | blocks, dtype, 4), tmp_path) <= FEW_WORDS
    constants = {name: constants[name] for name in ("NUM_KV_HEADS", "HEAD_DIM", "CAPACITY", "HAS_VALID")}
    constants |= {"BLOCK_D": next_power_of_2(head_dim), "ROWS": RING_ROWS}
    assert stack_bytes(compile_kernel(_fill_window_kernel, constants, dtype, 4), tmp_path) <= FEW_WORDS


@pytest.mark.parametrize(
    "dtype, head_dim, bits, group_size, rows, mask",
    [
        ("bf16", 128, (4, 4, 2), 128, 4, 1),
        pytest.param("fp16", 64, (4, 4, 2), 32, 4, 0, marks=pytest.mark.slow),
        pytest.param("fp16", 80, (3, 2, 4), 32, 4, 2, marks=pytest.mark.slow),
        pytest.param("bf16", 256, (3, 3, 3), 64, 4, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 128, (4, 4, 2), 128, 4096, 1, marks=pytest.mark.slow),
        pytest.param("fp16", 256, (2, 4, 2), 128, 4096, 1, marks=pytest.mark.slow),
        pytest.param("fp32", 128, (4, 4, 2), 128, 4, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attend_compiles_without_spills(dtype, head_dim, bits, group_size, rows, mask, tmp_path):
    constants = constants_of(head_dim, bits, group_size) | {"SKETCH": False, "KEY_BITS": 0, "OUTLIERS": 0}
    assert stack_bytes(compile_attend(constants, dtype, rows, mask), tmp_path) <= FEW_WORDS


def compile_attend(constants, dtype, rows, mask):
    head_dim = constants["HEAD_DIM"]
    block_m, block_n, num_warps = tile_sizes(rows, head_dim, dtype == "fp32", constants["SKETCH"])
    constants = constants | {
        "QUERIES_PER_KV": 4, "MASK": mask, "MASK_FLOOR": -32752.0, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_P": max(next_power_of_2(head_dim // 2), 16),
    }  # fmt: skip
    return compile_kernel(_attend_groups_kernel, constants, dtype, num_warps, mask=dtype if mask == 2 else "i1")


@pytest.mark.parametrize(
    "dtype, head_dim, bits, group_size",
    [
        ("bf16", 128, (2, 2), 32),
        pytest.param("fp32", 256, (4, 4), 64, marks=pytest.mark.slow),
        pytest.param("fp16", 64, (3, 2), 32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_append_of_a_sketch_compiles_without_spills(dtype, head_dim, bits, group_size, tmp_path, pointers):
    pointers.setitem(test_compile_for_hopper.POINTERS, "sketch", "fp32")
    constants = sketch_constants_of(head_dim, bits, group_size)
    constants |= {"HAS_VALID": True, "BLOCK_HALF": next_power_of_2(head_dim // 2)}
    for name in ("RADIUS_BITS", "ANGLE_BITS"):
        del constants[name]
    compiled = compile_kernel(_pack_sketch_kernel, constants, dtype, pack_warps(head_dim))
    assert stack_bytes(compiled, tmp_path) <= FEW_WORDS * (4 if head_dim > 128 else 1)
    constants = {"HEAD_DIM": head_dim, "BLOCKS": bits[0], "OFFSET": 12345, "ROWS": max(BLOCK // head_dim, 1)}
    assert stack_bytes(compile_kernel(_sketch_kernel, constants, "fp16", 1), tmp_path) <= FEW_WORDS


@pytest.mark.parametrize(
    "dtype, head_dim, bits, group_size, rows, mask",
    [
        ("bf16", 128, (2, 2), 32, 4, 1),
        pytest.param("fp16", 64, (4, 2), 32, 4, 0, marks=pytest.mark.slow),
        pytest.param("bf16", 128, (4, 2), 32, 4096, 1, marks=pytest.mark.slow),
        pytest.param("fp16", 256, (2, 3), 64, 4, 2, marks=pytest.mark.slow),
        pytest.param("fp16", 256, (2, 2), 128, 4096, 1, marks=pytest.mark.slow),
        pytest.param("fp32", 64, (2, 2), 32, 4, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attend_of_a_sketch_compiles_without_spills(dtype, head_dim, bits, group_size, rows, mask, tmp_path, pointers):
    pointers.setitem(test_compile_for_hopper.POINTERS, "sketch", "fp32" if dtype == "fp32" else "fp16")
    constants = sketch_constants_of(head_dim, bits, group_size) | {"SKETCH": True}
    assert stack_bytes(compile_attend(constants, dtype, rows, mask), tmp_path) <= FEW_WORDS


PACKED = {
    "polar_pairs": {"radius", "radius_scale", "radius_zero", "angle", "angle_scale", "angle_zero"},
    "qjl": {"signs", "outlier_signs", "norms", "outliers"},
}


@pytest.mark.parametrize("q_len", [1, None], ids=["decode", "chunk"])
@pytest.mark.parametrize("scheme", PACKED)
def test_ops_trace_without_guards_and_write_the_state(scheme, q_len, monkeypatch):
    # What a mask says of new tokens is plain torch, which indexes: without CUDA a fake tensor cannot.
    monkeypatch.setattr(
        "ottfx.group_pages.real_tokens",
        lambda mask, lengths, site, key: key.new_empty((key.shape[0], key.shape[2]), dtype=torch.bool),
    )
    shapes, mode, launches, _ = trace(scheme, q_len)
    assert shapes.guards == []
    names = [mutated(mode, node) for node in launches]
    # Attention and its combination; what packs, what fills the window. A sketch is made before either.
    made = [{"output"}] if scheme == "qjl" else []
    packed = {*PACKED[scheme], "value_codes", "value_scale", "value_zero_point"}
    window = {"key_residual", "value_residual", "residual_valid"}
    assert names == [*made, {"partial", "log_sum"}, {"output"}, *made, packed, window]
