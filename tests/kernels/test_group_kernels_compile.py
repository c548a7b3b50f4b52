"""The kernels of storage by groups compile for compute capability 9.0, and trace without guards, on any machine."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")

from ottfx.kernels.group_append import _fill_window_kernel  # noqa: E402
from ottfx.kernels.group_attend import tile_sizes  # noqa: E402
from ottfx.kernels.group_split import _attend_groups_kernel  # noqa: E402
from ottfx.kernels.launch import next_power_of_2  # noqa: E402
from ottfx.kernels.pair_append import RING_ROWS, _pack_kernel  # noqa: E402
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
    for name in ("radius", "angle"):
        monkeypatch.setitem(test_compile_for_hopper.POINTERS, name, "i32")
        for constant in ("scale", "zero"):
            monkeypatch.setitem(test_compile_for_hopper.POINTERS, f"{name}_{constant}", "fp16")


def constants_of(head_dim, bits, group_size):
    radius_bits, angle_bits, value_bits = bits
    return {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "CAPACITY": 128, "GROUP": group_size, "RADIUS_BITS": radius_bits,
        "ANGLE_BITS": angle_bits, "VALUE_BITS": value_bits, "VALUE_GROUPS": max(head_dim // group_size, 1),
    }  # fmt: skip


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
    block_m, block_n, num_warps = tile_sizes(rows, head_dim, dtype == "fp32")
    constants = constants_of(head_dim, bits, group_size) | {
        "QUERIES_PER_KV": 4, "MASK": mask, "MASK_FLOOR": -32752.0, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_P": max(next_power_of_2(head_dim // 2), 16),
    }  # fmt: skip
    compiled = compile_kernel(_attend_groups_kernel, constants, dtype, num_warps, mask=dtype if mask == 2 else "i1")
    assert stack_bytes(compiled, tmp_path) <= FEW_WORDS


@pytest.mark.parametrize("q_len", [1, None], ids=["decode", "chunk"])
def test_ops_trace_without_guards_and_write_the_state(q_len, monkeypatch):
    # What a mask says of new tokens is plain torch, which indexes: without CUDA a fake tensor cannot.
    monkeypatch.setattr(
        "ottfx.group_pages.real_tokens",
        lambda mask, lengths, site, key: key.new_empty((key.shape[0], key.shape[2]), dtype=torch.bool),
    )
    shapes, mode, launches, state = trace("polar_pairs", q_len)
    assert shapes.guards == []
    names = [mutated(mode, node) for node in launches]
    # Attention and its combination; what packs, what fills the window.
    assert names[:2] == [{"partial", "log_sum"}, {"output"}]
    window = {"key_residual", "value_residual", "residual_valid"}
    packs = {name.removeprefix("key_").replace("zero_point", "zero") for name in state if name.startswith("key_")}
    assert names[2] == packs - {"residual"} | {"value_codes", "value_scale", "value_zero_point"}
    assert names[3] == window
