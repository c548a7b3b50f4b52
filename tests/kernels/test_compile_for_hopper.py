"""Every kernel compiles for compute capability 9.0, on any machine, and the usual shapes fit the registers."""

import os
import re
import subprocess

import pytest

triton = pytest.importorskip("triton")

from pathlib import Path  # noqa: E402

from ottfx.kernels.affine_attend import tile_sizes  # noqa: E402
from ottfx.kernels.affine_combine import (  # noqa: E402
    _combine_kernel,
    _combine_rotated_kernel,
    block_sizes,
    row_sizes,
)
from ottfx.kernels.affine_decode import _decode_kernel  # noqa: E402
from ottfx.kernels.affine_encode import (  # noqa: E402
    KEY_CHANNELS,
    KEY_WARPS,
    _encode_key_pages_kernel,
    _encode_value_pages_kernel,
    value_warps,
)
from ottfx.kernels.affine_select import _select_outliers_kernel  # noqa: E402
from ottfx.kernels.affine_split import _attend_kernel  # noqa: E402
from ottfx.kernels.affine_store import _store_tokens_kernel  # noqa: E402
from ottfx.kernels.decode_plan import K_WIDTH, LEAN_REGISTERS, TILE, decode_plan  # noqa: E402
from ottfx.kernels.group_seats import WIDEST, _seat_tokens_kernel  # noqa: E402
from ottfx.kernels.key_order import _order_channels_kernel  # noqa: E402
from ottfx.kernels.launch import channel_chunk, next_power_of_2  # noqa: E402
from ottfx.kernels.rotate import _rotate_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
    # Which default it has for fused multiply-add, said once by some versions.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]

POINTERS = {
    "key_codes": "i32", "value_codes": "i32", "lengths": "i64", "residual_valid": "u8", "valid": "i1",
    "replaced": "i8", "outlier_position": "i32", "value_outlier_position": "i32", "spill_count": "i32",
    "key_scale": "fp16", "key_zero_point": "fp16", "value_scale": "fp16", "value_zero_point": "fp16",
    "partial": "fp32", "log_sum": "fp32", "key_order": "i16", "order": "i16",
    "codes": "i32", "scale": "fp16", "zero_point": "fp16", "score": "fp32", "hard": "i8",
    "key_upper": "u8", "value_upper": "u8",
    "key_row_scale": "i64", "value_row_scale": "i64",
    "seat_key_scale": "i64", "seat_value_scale": "i64", "seat_row": "i64",
}  # fmt: skip
SEATS = {
    "seat_key": "i8", "seat_value": "i8", "seat_row": "i8", "value_seat_row": "i8",
    "seat_key_scale": "fp16", "seat_value_scale": "fp16",
}  # fmt: skip


def compile_kernel(kernel, constants, dtype, num_warps, mask="i1", integers="i32", coded_window=None, **options):
    try:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError:
        pytest.skip("this Triton cannot compile ahead of time")
    pointers = POINTERS | {"mask": mask}
    if constants.get("MIXED", False) if coded_window is None else coded_window:
        pointers |= {"key_residual": "i8", "value_residual": "i8", "key_row_scale": "fp16", "value_row_scale": "fp16"}
    if constants.get("PAGE_SEATS") or kernel is _seat_tokens_kernel:
        pointers |= SEATS
    if constants.get("ENCODED") is False:
        # The launcher passes the lengths where there is nothing to read.
        pointers |= {"score": "i64", "hard": "i64"}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name.removesuffix("_ptr"), dtype)
        else:
            signature[name] = "fp32" if name == "softmax_scale" else "i32" if name.startswith("stride") else integers
        if name.endswith("_ptr") or (name.startswith("stride") and "mask" not in name):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": 1} | options
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert scattered_reductions(compiled.asm["ttgir"]) == []
    return compiled


def scattered_reductions(ttgir):
    """Reductions over bits of the lane number that are not neighbours: Triton 3.6 adds up other lanes than those."""
    lanes = {name: eval(bits) for name, bits in re.findall(r"^(#linear\d*) = .*? lane = (\[.*?\]), warp", ttgir, re.M)}
    axes, found = [], []
    for line in ttgir.splitlines():
        if match := re.search(r'"tt.reduce".*axis = (\d+)', line):
            axes.append(int(match[1]))
        elif axes and (match := re.search(r"\}\) : \((tensor<.*?>)\)? ->|\}\) : \((tensor<[^)]*)\)", line)):
            axis, layout = axes.pop(), match[0]
            for name in re.findall(r"#linear\d*", layout):
                for dim in re.findall(r"dim = (\d+)", layout):
                    axis += int(dim) <= axis
                along = [i for i, bit in enumerate(lanes[name]) if bit[axis]]
                if along and along != list(range(along[0], along[-1] + 1)):
                    found.append((line.strip(), lanes[name]))
    return found


def inspect(compiled, folder, tool, option):
    """What a program of the CUDA toolkit, one of those that come with Triton, prints about a kernel."""
    program = TOOLS / tool
    if not program.exists():
        pytest.skip(f"this Triton has no {tool}")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([str(program), option, str(cubin)], capture_output=True, text=True, check=True).stdout


def stack_bytes(compiled, folder):
    """Bytes of local memory of a thread: what does not fit its registers."""
    report = inspect(compiled, folder, "cuobjdump", "--dump-resource-usage")
    return int(re.search(r"STACK:(\d+)", report).group(1))


def loop_instructions(compiled, folder):
    """Opcodes of the loop that has the most products of the tensor cores."""
    lines = inspect(compiled, folder, "nvdisasm", "-c").splitlines()
    starts = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_\w+):", line))}
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"BRA\s.*(\.L_\w+)", line)
        if target and starts.get(target[1], end) < end:
            body = "\n".join(lines[starts[target[1]] : end])
            loops.append(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z0-9_]+)", body))
    return max(loops, key=lambda body: body.count("HMMA"))


def decode_constants(head_dim, bits, group_size, rows, mask, plus=False):
    plan = decode_plan(
        pairs=64, num_kv_heads=8, rows=rows, head_dim=head_dim, bits=bits, group_size=group_size, ring_rows=160,
        pages=64, page_seats=2 * plus, coded_window=plus,
    )  # fmt: skip
    constants = {
        "NUM_KV_HEADS": 8, "QUERIES_PER_KV": rows, "HEAD_DIM": head_dim, "CAPACITY": 160, "KEY_BITS": bits[0],
        "VALUE_BITS": bits[1], "GROUP": group_size, "POOL_ROWS": 0 if plus else 35, "PAGE_SEATS": 2 * plus,
        "MASK": mask, "ONE_MASK": True,
        "SINGLE": plan.single, "COLUMNS": plan.columns, "TILE": TILE, "BLOCK_D": plan.block_d,
        "WHOLE_TILES": group_size % TILE == 0, "K_WIDTH": K_WIDTH,
        "MIXED": plus, "SYMMETRIC": plus, "NEW_APART": plus,
    }  # fmt: skip
    return constants, plan.max_registers


def attend_constants(head_dim, bits, group_size, value_groups, dtype, rows, mask, plus=False):
    block_m, block_n, num_warps = tile_sizes(rows, head_dim, bits, dtype == "fp32")
    constants = {
        "NUM_KV_HEADS": 8, "QUERIES_PER_KV": 4, "HEAD_DIM": head_dim, "CAPACITY": 160, "KEY_BITS": bits[0],
        "VALUE_BITS": bits[1], "GROUP": group_size, "VALUE_GROUPS": value_groups, "MASK": mask,
        "POOL_ROWS": 0 if plus else 35, "PAGE_SEATS": 2 * plus,
        "MASK_FLOOR": -32752.0, "PRECISION": "ieee" if dtype == "fp32" else "tf32", "BLOCK_M": block_m,
        "BLOCK_N": block_n, "BLOCK_D": next_power_of_2(head_dim), "MIXED": plus, "SYMMETRIC": plus,
    }  # fmt: skip
    return constants, num_warps


def store_constants(head_dim, bits, group_size, value_groups, traces, write_back, encoded=False, plus=False):
    return {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "CAPACITY": 160, "KEY_BITS": bits[0], "VALUE_BITS": bits[1],
        "GROUP": group_size, "VALUE_GROUPS": value_groups, "KEY_WINDOW": 32, "KEY_STEP": group_size,
        "VALUE_WINDOW": 32, "VALUE_STEP": group_size, "HAS_VALID": True, "HAS_OUTLIERS": traces, "SEATED": plus,
        "MEAN_OF_REST": True, "MARK": True, "WRITE_BACK": write_back, "ONE_TOKEN": traces, "ENCODED": encoded,
        "KEY_PARTS": head_dim // channel_chunk(head_dim) if encoded else 1, "VALUE_PARTS": 8 if encoded else 1,
        "CHUNK": channel_chunk(head_dim), "BLOCK_HALF": next_power_of_2(head_dim // 2),
        "BLOCK_D": next_power_of_2(head_dim), "RING_ROWS": 16, "MIXED": plus, "SYMMETRIC": plus, "SEARCH": plus,
        "ROTATED": head_dim & -head_dim if plus and traces else 1,
    }  # fmt: skip


def select_constants(head_dim, group_size, seats, spill, encoded=False):
    return {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "CAPACITY": 160, "GROUP": group_size, "WINDOW": 32,
        "STEP": group_size, "SEATS": seats, "SPILL": spill, "BLOCK_SEATS": max(4, next_power_of_2(seats)), "NORM": 2,
        "HAS_VALID": True, "ENCODED": encoded, "ORDERS": not encoded, "CHUNK": channel_chunk(head_dim),
        "BLOCK_D": next_power_of_2(head_dim),
    }  # fmt: skip


def seat_constants(head_dim, group_size, seats, orders):
    return {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "CAPACITY": 160, "GROUP": group_size, "WINDOW": 32,
        "STEP": group_size, "SEATS": seats, "NORM": 1, "HAS_VALID": True, "ORDERS": orders,
        "CHUNK": min(next_power_of_2(head_dim), WIDEST), "BLOCK_SEATS": max(4, next_power_of_2(seats)),
        "BLOCK_D": next_power_of_2(head_dim),
    }  # fmt: skip


def combine_constants(rotated, block_parts=64, head_dim=128):
    sizes, num_warps = (row_sizes if rotated else block_sizes)(block_parts, head_dim)
    constants = {"QUERIES_PER_KV": 4, "HEAD_DIM": head_dim, "BLOCK_PARTS": block_parts, **sizes}
    if rotated:
        constants |= {"NUM_KV_HEADS": 8, "SIZE": head_dim & -head_dim, "OFFSET": -1, "NEW_APART": True}
    return constants, num_warps


def encode_keys_constants(head_dim, bits, group_size, traces, padded, plus=False):
    return {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "BITS": bits, "GROUP": group_size, "WINDOW": 32, "STEP": group_size,
        "NORM": 1, "HAS_VALID": padded, "HAS_OUTLIERS": traces and not plus, "SEATED": plus,
        "CHUNK": min(head_dim, KEY_CHANNELS), "MIXED": plus, "SEARCH": plus,
    }  # fmt: skip


def encode_values_constants(head_dim, bits, value_groups, padded, plus=False):
    return {
        "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "BITS": bits, "VALUE_GROUPS": value_groups, "WINDOW": 32, "STEP": 128,
        "HAS_VALID": padded, "SEATED": plus, "SYMMETRIC": plus, "SEARCH": plus,
    }  # fmt: skip


ATTEND = [
    ("fp16", 128, (2, 2), 128, 1, 4, 1),
    pytest.param("bf16", 128, (2, 2), 32, 4, 4, 1, marks=pytest.mark.slow),
    pytest.param("bf16", 128, (3, 3), 64, 1, 4, 0, marks=pytest.mark.slow),
    pytest.param("bf16", 128, (4, 8), 128, 1, 4, 2, marks=pytest.mark.slow),
    ("fp16", 80, (4, 8), 64, 5, 4, 2),
    pytest.param("bf16", 256, (2, 3), 32, 1, 4, 1, marks=pytest.mark.slow),
    pytest.param("bf16", 16, (2, 2), 32, 1, 4, 1, marks=pytest.mark.slow),
    pytest.param("bf16", 128, (2, 2), 128, 1, 4096, 1, marks=pytest.mark.slow),
    pytest.param("fp16", 256, (8, 4), 32, 2, 4096, 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype, head_dim, bits, group_size, value_groups, rows, mask", ATTEND, ids=str)
def test_attend_compiles_without_spills(dtype, head_dim, bits, group_size, value_groups, rows, mask, tmp_path):
    constants, num_warps = attend_constants(head_dim, bits, group_size, value_groups, dtype, rows, mask)
    compiled = compile_kernel(_attend_kernel, constants, dtype, num_warps, mask=dtype if mask == 2 else "i1")
    assert stack_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize(
    "dtype, head_dim, rows, mask, plus",
    [
        ("bf16", 128, 4, False, False),
        ("fp16", 128, 1, True, False),
        ("bf16", 128, 1, False, True),
        pytest.param("fp16", 64, 8, True, False, marks=pytest.mark.slow),
        pytest.param("bf16", 64, 1, False, False, marks=pytest.mark.slow),
        pytest.param("bf16", 80, 1, False, False, marks=pytest.mark.slow),
        pytest.param("bf16", 128, 4, False, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_decode_at_two_bits_fits_a_twelfth_of_a_multiprocessor(dtype, head_dim, rows, mask, plus, tmp_path):
    constants, max_registers = decode_constants(head_dim, (2, 2), 128, rows, mask, plus)
    assert max_registers == LEAN_REGISTERS
    compiled = compile_kernel(_decode_kernel, constants, dtype, 1, maxnreg=max_registers)
    # With a mask, channels that are padded, or rows of 8 bits, some compilers put a few words on the stack; with such
    # rows and several queries also addresses that only their programs need, in front of all loops.
    fits = (head_dim, mask, plus) == (128, False, False)
    assert stack_bytes(compiled, tmp_path) <= (0 if fits else 160 if plus and rows > 1 else 16)
    instructions = loop_instructions(compiled, tmp_path)
    assert mask or head_dim == 80 or not {"LDL", "STL"} & set(instructions)
    # Codes reach the tensor cores where they were loaded: only weights and maxima cross lanes, nothing shared memory.
    assert sum(name == "SHFL" for name in instructions) <= (40 if mask else 24)
    assert mask or not {"LDS", "STS", "LDSM", "STSM", "BAR"} & set(instructions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "head_dim, bits, group_size, rows",
    [(128, (4, 4), 128, 4), (128, (3, 3), 128, 1), (128, (2, 4), 32, 4), (256, (2, 2), 128, 2), (128, (8, 8), 64, 16)],
    ids=str,
)
def test_decode_compiles(head_dim, bits, group_size, rows):
    constants, _ = decode_constants(head_dim, bits, group_size, rows, False)
    assert compile_kernel(_decode_kernel, constants, "bf16", 1).asm["cubin"]


@pytest.mark.parametrize("rows", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_decode_reads_seats_beside_a_window_in_full_precision(rows, tmp_path):
    constants, _ = decode_constants(128, (4, 4), 128, rows, False, plus=True)
    compiled = compile_kernel(_decode_kernel, constants | {"MIXED": False}, "bf16", 1, coded_window=False)
    # Of all three kinds of programs one has a number or two on the stack.
    instructions = loop_instructions(compiled, tmp_path)
    assert instructions.count("LDL") <= 4 and "STL" not in instructions


@pytest.mark.slow
@pytest.mark.parametrize("head_dim, bits, value_groups", [(96, (3, 2), 3), (128, (2, 2), 1)])
def test_attend_compiles_in_float32(head_dim, bits, value_groups):
    # Products outside the tensor cores take more registers than there are: it spills, and is right.
    constants, num_warps = attend_constants(head_dim, bits, 128, value_groups, "fp32", 4, 2)
    assert compile_kernel(_attend_kernel, constants, "fp32", num_warps, mask="fp32").asm["cubin"]


@pytest.mark.parametrize(
    "dtype, head_dim, bits, group_size, value_groups, traces, write_back, plus",
    [
        ("fp16", 128, (2, 2), 128, 1, True, False, False),
        ("bf16", 128, (2, 2), 128, 1, True, False, True),
        ("bf16", 80, (3, 4), 32, 5, False, True, False),
        ("bf16", 128, (3, 3), 64, 4, True, False, False),
        pytest.param("fp32", 256, (3, 8), 32, 1, False, True, False, marks=pytest.mark.slow),
        pytest.param("fp16", 16, (8, 3), 128, 1, True, False, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_append_compiles_without_spills(
    dtype, head_dim, bits, group_size, value_groups, traces, write_back, plus, tmp_path
):
    constants = store_constants(head_dim, bits, group_size, value_groups, traces, write_back, plus=plus)
    compiled = compile_kernel(_store_tokens_kernel, constants, dtype, 4)
    # The search of ranges leaves a few words on the stack, where a group is packed: once in 128 steps.
    most = 176 if tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9) else 64
    assert stack_bytes(compiled, tmp_path) <= (most if plus else 0)
    constants = store_constants(head_dim, bits, group_size, value_groups, traces, write_back, encoded=True, plus=plus)
    assert compile_kernel(_store_tokens_kernel, constants, dtype, 4).asm["cubin"]


@pytest.mark.parametrize(
    "dtype, head_dim, group_size, seats, spill, encoded",
    [
        ("bf16", 128, 128, 3, 32, False),
        ("bf16", 128, 128, 3, 3, True),
        pytest.param("fp32", 80, 32, 8, 0, False, marks=pytest.mark.slow),
        pytest.param("fp16", 256, 128, 32, 64, True, marks=pytest.mark.slow),
    ],
)
def test_selection_compiles(dtype, head_dim, group_size, seats, spill, encoded):
    constants = select_constants(head_dim, group_size, seats, spill, encoded)
    assert compile_kernel(_select_outliers_kernel, constants, dtype, 4, coded_window=spill == 3).asm["cubin"]


@pytest.mark.parametrize(
    "dtype, head_dim, group_size, seats, orders",
    [("bf16", 128, 128, 2, True), ("fp16", 80, 64, 3, False), ("bf16", 256, 32, 1, False)],
)
def test_seats_compile_without_spills(dtype, head_dim, group_size, seats, orders, tmp_path):
    constants = seat_constants(head_dim, group_size, seats, orders)
    compiled = compile_kernel(_seat_tokens_kernel, constants, dtype, 4, coded_window=True)
    assert stack_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize(
    "head_dim, bits, group_size, value_groups, padded, plus",
    [
        (128, (2, 2), 128, 1, False, False),
        pytest.param(128, (2, 2), 128, 1, False, True, marks=pytest.mark.slow),
        pytest.param(128, (4, 4), 64, 4, True, False, marks=pytest.mark.slow),
        pytest.param(256, (3, 3), 32, 1, False, False, marks=pytest.mark.slow),
        pytest.param(64, (8, 3), 32, 2, True, False, marks=pytest.mark.slow),
    ],
)
def test_encoders_compile(head_dim, bits, group_size, value_groups, padded, plus, tmp_path):
    keys = encode_keys_constants(head_dim, bits[0], group_size, True, padded, plus)
    assert stack_bytes(compile_kernel(_encode_key_pages_kernel, keys, "bf16", KEY_WARPS), tmp_path) <= 16
    values = encode_values_constants(head_dim, bits[1], value_groups, padded, plus)
    compiled = compile_kernel(_encode_value_pages_kernel, values, "bf16", value_warps(head_dim))
    assert stack_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize(
    "rotated, block_parts, head_dim",
    # The last of each have more parts than a program holds at once.
    [(False, 64, 128), (False, 2048, 128), (True, 4, 128), (True, 64, 80), (True, 256, 128), (True, 1024, 256)],
)
def test_combination_compiles_without_spills(rotated, block_parts, head_dim, tmp_path):
    constants, num_warps = combine_constants(rotated, block_parts, head_dim)
    kernel = _combine_rotated_kernel if rotated else _combine_kernel
    assert stack_bytes(compile_kernel(kernel, constants, "bf16", num_warps), tmp_path) == 0


ORDER = {
    "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "CAPACITY": 160, "GROUP": 128, "WINDOW": 32, "STEP": 128, "HAS_VALID": True,
    "BLOCK_D": 128,
}  # fmt: skip
ROTATE = {"HEADS": 8, "HEAD_DIM": 128, "SIZE": 128, "BACK": True, "ROWS": 4, "OFFSET": 5}
UNKNOWN_BOUNDS = [
    (_order_channels_kernel, ORDER),
    (_rotate_kernel, ROTATE),
    (_select_outliers_kernel, select_constants(128, 128, 3, 32)),
    (_seat_tokens_kernel, seat_constants(128, 128, 2, False)),
    (_store_tokens_kernel, store_constants(128, (2, 2), 128, 1, True, False)),
    (_combine_kernel, combine_constants(False)[0]),
    (_combine_rotated_kernel, combine_constants(True)[0]),
    (_encode_key_pages_kernel, encode_keys_constants(128, 2, 128, True, True)),
    (_encode_value_pages_kernel, encode_values_constants(128, 2, 1, True)),
    pytest.param(_decode_kernel, decode_constants(128, (2, 2), 128, 4, False)[0], marks=pytest.mark.slow),
    pytest.param(_attend_kernel, attend_constants(128, (2, 2), 128, 1, "bf16", 4, 1)[0], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kernel, constants", UNKNOWN_BOUNDS, ids=lambda x: getattr(x, "__name__", ""))
def test_integers_may_come_as_int64(kernel, constants):
    # So Inductor passes sizes of an exported program.
    coded_window = kernel in (_order_channels_kernel, _seat_tokens_kernel)
    num_warps = 1 if kernel in (_decode_kernel, _encode_value_pages_kernel) else 4
    assert compile_kernel(kernel, constants, "bf16", num_warps, integers="i64", coded_window=coded_window).asm["cubin"]
