"""The kernels of schemes that store by tokens compile for compute capability 9.0, on any machine."""

import os

import pytest

triton = pytest.importorskip("triton")

from ottfx import polar_codes  # noqa: E402
from ottfx.kernels.polar_append import _append_kernel as _append_polar_kernel  # noqa: E402
from ottfx.kernels.polar_codes import level_constants, padded_blocks  # noqa: E402
from ottfx.kernels.rotate import BLOCK  # noqa: E402
from ottfx.kernels.table_codes import padded_channels, table_constants  # noqa: E402
from ottfx.kernels.token_attend import tile_sizes  # noqa: E402
from ottfx.kernels.token_split import _attend_tokens_kernel  # noqa: E402
from ottfx.kernels.turbo_append import _append_kernel as _append_turbo_kernel  # noqa: E402
from ottfx.lloyd_max import sphere_magnitudes  # noqa: E402
from ottfx.turbo_codes import words_per_token  # noqa: E402
from tests.kernels.test_compile_for_hopper import compile_kernel, stack_bytes  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]

FEW_WORDS = 16
"""Bytes of a thread that may be on the stack: some compilers put a word or two there."""


def turbo_constants(head_dim, bits):
    tables = [sphere_magnitudes(head_dim, width).values for width in bits]
    return {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "KEY_BITS": bits[0], "VALUE_BITS": bits[1],
        "KEY_WORDS": words_per_token(head_dim, bits[0]), "VALUE_WORDS": words_per_token(head_dim, bits[1]),
        "BLOCK_D": padded_channels(head_dim), **table_constants(0, 8, tables[0]), **table_constants(8, 8, tables[1]),
    }  # fmt: skip


def polar_constants(head_dim, bits, tables_of):
    tables = [tables_of(level, width) for level, width in enumerate((bits, 2, 2, 2), 1)]
    return {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "BLOCK_D": padded_blocks(head_dim), **level_constants(tables),
    }  # fmt: skip


def append_constants(constants):
    head_dim = constants["HEAD_DIM"]
    rows = max(BLOCK // constants["BLOCK_D"], 1)
    return constants | {"SIZE": head_dim & -head_dim, "OFFSET": 12345, "ROWS": rows}


def append_polar_constants(head_dim, bits):
    words, upper = polar_codes.angle_words(head_dim, bits), sum(polar_codes.upper_bytes(head_dim))
    constants = polar_constants(head_dim, bits, polar_codes.slopes)
    return append_constants(constants | {"BITS": bits, "WORDS": words, "BYTES": upper})


def attend_constants(constants, polar, rows, dtype, mask):
    bits = max(constants["KEY_BITS"], constants["VALUE_BITS"])
    block_m, block_n, num_warps = tile_sizes(rows, constants["HEAD_DIM"], bits, dtype == "fp32")
    return constants | {
        "QUERIES_PER_KV": 4, "MASK": mask, "MASK_FLOOR": -32752.0, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "BLOCK_M": block_m, "BLOCK_N": block_n, "POLAR": polar, "UPPER_BYTES": constants.get("UPPER_BYTES", 0),
    }, num_warps  # fmt: skip


def attend_polar_constants(head_dim, bits, rows, dtype, mask):
    words = polar_codes.angle_words(head_dim, bits)
    constants = polar_constants(head_dim, bits, polar_codes.cosines) | {
        "KEY_BITS": bits, "VALUE_BITS": bits, "KEY_WORDS": words, "VALUE_WORDS": words,
        "UPPER_BYTES": sum(polar_codes.upper_bytes(head_dim)),
    }  # fmt: skip
    return attend_constants(constants, True, rows, dtype, mask)


@pytest.mark.parametrize(
    "dtype, head_dim, bits",
    [("bf16", 128, (2, 2)), ("fp16", 80, (3, 4)), pytest.param("fp32", 256, (4, 3), marks=pytest.mark.slow)],
    ids=str,
)
def test_append_of_turbo_compiles_without_spills(dtype, head_dim, bits, tmp_path):
    constants = append_constants(turbo_constants(head_dim, bits)) | {"CORRECT": True}
    assert stack_bytes(compile_kernel(_append_turbo_kernel, constants, dtype, 1), tmp_path) <= FEW_WORDS


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
    constants, num_warps = attend_constants(turbo_constants(head_dim, bits), False, rows, dtype, mask)
    compiled = compile_kernel(_attend_tokens_kernel, constants, dtype, num_warps, mask=dtype if mask == 2 else "i1")
    assert stack_bytes(compiled, tmp_path) <= FEW_WORDS


@pytest.mark.parametrize(
    "dtype, head_dim, bits",
    [("bf16", 128, 4), pytest.param("fp16", 80, 2, marks=pytest.mark.slow), ("fp32", 256, 1)],
    ids=str,
)
def test_append_of_polar_compiles_without_spills(dtype, head_dim, bits, tmp_path):
    constants = append_polar_constants(head_dim, bits)
    assert stack_bytes(compile_kernel(_append_polar_kernel, constants, dtype, 1), tmp_path) <= FEW_WORDS


@pytest.mark.parametrize(
    "dtype, head_dim, bits, rows, mask",
    [
        ("bf16", 128, 4, 4, 1),
        pytest.param("bf16", 64, 4, 4, 0, marks=pytest.mark.slow),
        pytest.param("bf16", 128, 2, 4, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 128, 4, 4096, 1, marks=pytest.mark.slow),
        pytest.param("fp16", 80, 1, 4096, 2, marks=pytest.mark.slow),
        pytest.param("bf16", 256, 4, 4, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 256, 2, 4096, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attend_of_polar_compiles_without_spills(dtype, head_dim, bits, rows, mask, tmp_path):
    constants, num_warps = attend_polar_constants(head_dim, bits, rows, dtype, mask)
    compiled = compile_kernel(_attend_tokens_kernel, constants, dtype, num_warps, mask=dtype if mask == 2 else "i1")
    assert stack_bytes(compiled, tmp_path) <= FEW_WORDS


@pytest.mark.slow
def test_integers_may_come_as_int64():
    # So Inductor passes sizes of an exported program.
    turbo = turbo_constants(128, (2, 2))
    for kernel, constants in (
        (_append_turbo_kernel, append_constants(turbo) | {"CORRECT": False}),
        (_append_polar_kernel, append_polar_constants(128, 4)),
        (_attend_tokens_kernel, attend_constants(turbo, False, 4, "bf16", 1)[0]),
        (_attend_tokens_kernel, attend_polar_constants(128, 4, 4, "bf16", 1)[0]),
    ):
        assert compile_kernel(kernel, constants, "bf16", 4, integers="i64").asm["cubin"]
