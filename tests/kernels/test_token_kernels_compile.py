"""The kernels of schemes that store by tokens compile for compute capability 9.0, on any machine."""

import os

import pytest

triton = pytest.importorskip("triton")

from ottfx.kernels.rotate import BLOCK  # noqa: E402
from ottfx.kernels.table_codes import padded_channels, table_constants  # noqa: E402
from ottfx.kernels.token_attend import _attend_tokens_kernel, tile_sizes  # noqa: E402
from ottfx.kernels.turbo_append import _append_kernel as _append_turbo_kernel  # noqa: E402
from ottfx.lloyd_max import sphere_magnitudes  # noqa: E402
from ottfx.turbo_codes import words_per_token  # noqa: E402
from tests.kernels.test_compile_for_hopper import compile_kernel, stack_bytes  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]


def turbo_constants(head_dim, bits):
    constants = {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "KEY_BITS": bits[0], "VALUE_BITS": bits[1],
        "KEY_WORDS": words_per_token(head_dim, bits[0]), "VALUE_WORDS": words_per_token(head_dim, bits[1]),
        "BLOCK_D": padded_channels(head_dim),
    }  # fmt: skip
    for prefix, width in zip("KV", bits, strict=True):
        constants |= table_constants(prefix, sphere_magnitudes(head_dim, width).values)
    return constants


def append_constants(head_dim, correct=False):
    block_d = padded_channels(head_dim)
    return {
        "SIZE": head_dim & -head_dim, "OFFSET": 12345, "CORRECT": correct, "ROWS": max(BLOCK // block_d, 1),
    }  # fmt: skip


def attend_constants(head_dim, bits, rows, dtype, mask):
    block_m, block_n, num_warps = tile_sizes(rows, head_dim, bits, dtype == "fp32")
    return {
        "QUERIES_PER_KV": 4, "MASK": mask, "MASK_FLOOR": -32752.0, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "BLOCK_M": block_m, "BLOCK_N": block_n,
    }, num_warps  # fmt: skip


@pytest.mark.parametrize(
    "dtype, head_dim, bits",
    [("bf16", 128, (2, 2)), ("fp16", 80, (3, 4)), pytest.param("fp32", 256, (4, 3), marks=pytest.mark.slow)],
    ids=str,
)
def test_append_of_turbo_compiles_without_spills(dtype, head_dim, bits, tmp_path):
    constants = turbo_constants(head_dim, bits) | append_constants(head_dim, correct=True)
    assert stack_bytes(compile_kernel(_append_turbo_kernel, constants, dtype, 1), tmp_path) == 0


@pytest.mark.parametrize(
    "dtype, head_dim, bits, rows, mask",
    [
        ("bf16", 128, (2, 2), 4, 0),
        ("fp16", 128, (4, 4), 4, 1),
        pytest.param("bf16", 128, (3, 3), 4, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 128, (2, 2), 4096, 1, marks=pytest.mark.slow),
        pytest.param("fp16", 80, (3, 2), 4096, 2, marks=pytest.mark.slow),
        pytest.param("bf16", 256, (4, 4), 4, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 256, (3, 3), 4096, 1, marks=pytest.mark.slow),
        pytest.param("fp16", 128, (4, 4), 4096, 1, marks=pytest.mark.slow),
        pytest.param("fp16", 64, (2, 2), 4, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attend_of_turbo_compiles_without_spills(dtype, head_dim, bits, rows, mask, tmp_path):
    constants, num_warps = attend_constants(head_dim, max(bits), rows, dtype, mask)
    constants |= turbo_constants(head_dim, bits)
    compiled = compile_kernel(_attend_tokens_kernel, constants, dtype, num_warps, mask=dtype if mask == 2 else "i1")
    assert stack_bytes(compiled, tmp_path) == 0


@pytest.mark.slow
def test_integers_may_come_as_int64():
    constants = turbo_constants(128, (2, 2)) | append_constants(128)
    assert compile_kernel(_append_turbo_kernel, constants, "bf16", 1, integers="i64").asm["cubin"]
    constants = turbo_constants(128, (2, 2)) | attend_constants(128, 2, 4, "bf16", 1)[0]
    assert compile_kernel(_attend_tokens_kernel, constants, "bf16", 4, integers="i64").asm["cubin"]
