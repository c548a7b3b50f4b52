"""Every scheme's ops on the card against their plain-torch definition on the CPU: same inputs, same state."""

import pytest
import torch

from ottfx.cache_state import CacheHalf
from ottfx.registry import get_scheme, make_config
from ottfx.schemes.base import CacheShape

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Relative error of the attention output: rounding of the dtype, and codes that differ by one at ties."""
BORDERS = (
    {name: {torch.float32: 2e-3, torch.float16: 4e-2} for name in ("polar_pairs", "qjl")}
    | {name: {torch.float32: 1e-2} for name in ("turbo", "polar")}
    | {"ott+": {torch.float32: 1e-2, torch.float16: 4e-2}}
)
"""More than that, where codes are made of rotated values, angles or projections: their rounding differs, so some fall
to the other side of a border between two codes. The definition of 2-bit `turbo` with its rotation in float64 and in
float32 differs by 4e-3, through 8 words of a million. One channel of one group for which `ott+` finds two ranges
equally good makes 5e-3 of 8 heads of 256."""

CASES = [
    # scheme, options, batch, query heads, kv heads, head_dim
    ("none", {}, 2, 6, 2, 64),
    ("kivi", {"bits": 2}, 2, 9, 3, 64),
    ("kivi", {"bits": 4, "group_size": 64}, 1, 8, 1, 128),
    ("kivi", {"key_bits": 3, "value_bits": 8, "group_size": 32, "residual_length": 96}, 3, 4, 4, 80),
    ("ott", {"bits": 2}, 2, 32, 8, 128),
    ("ott", {"bits": 2, "group_size": 32, "residual_length": 0, "spill_capacity": 4}, 2, 4, 4, 96),
    ("ott", {"bits": 3, "residual_length": 64, "score_norm": 2}, 1, 8, 2, 256),
    ("ott", {"bits": 4, "outlier_capacity": 8, "mask_replaced": False}, 2, 6, 6, 64),
    ("ott+", {"bits": 2}, 2, 32, 8, 128),
    ("ott+", {"bits": 2, "group_size": 64}, 2, 4, 2, 80),
    ("ott+", {"bits": 3}, 1, 8, 2, 256),
    ("ott+", {"bits": 2, "mixed_keys": False, "rotate_values": False, "group_size": 32}, 2, 6, 3, 64),
    ("turbo", {"bits": 2}, 2, 32, 8, 128),
    ("turbo", {"bits": 3, "norm_correction": True, "seed": 9}, 2, 4, 2, 80),
    ("turbo", {"key_bits": 4, "value_bits": 3}, 1, 8, 2, 256),
    ("polar", {}, 2, 32, 8, 128),
    ("polar", {"first_bits": 2, "seed": 9}, 2, 4, 2, 80),
    ("polar", {"first_bits": 1}, 1, 8, 2, 256),
    ("polar_pairs", {}, 2, 32, 8, 128),
    ("polar_pairs", {"key_bits": 3, "group_size": 32, "residual_length": 96}, 2, 4, 2, 80),
    ("polar_pairs", {"radius_bits": 2, "value_bits": 4, "group_size": 64}, 1, 8, 2, 256),
    ("qjl", {}, 2, 32, 8, 128),
    ("qjl", {"early_key_bits": 3, "outlier_channels": 4, "seed": 9, "residual_length": 64}, 2, 9, 3, 64),
    ("qjl", {"early_layers": 0, "value_bits": 4, "group_size": 64}, 1, 8, 2, 256),
]
STEPS = (300, 1, 1, 5, 120, 1, 260, 1)
"""Tokens of each call: a prompt, decode steps, chunks that cross one and several group boundaries."""


def halves_on(device, scheme, config, batch, kv_heads, head_dim, dtype):
    shape = CacheShape(
        batch_size=batch, num_kv_heads=kv_heads, head_dim=head_dim, pages=8, dtype=dtype, device=torch.device(device)
    )
    return [CacheHalf.allocate(scheme, config, role, shape) for role in ("key", "value")]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name, options, batch, heads, kv_heads, head_dim", CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_gpu_matches_the_definition(name, options, batch, heads, kv_heads, head_dim, dtype, masked):
    scheme, config = get_scheme(name), make_config(name, **options).at_layer(5)
    allowed = BORDERS.get(name, {}).get(dtype, TOLERANCE[dtype])
    generator = torch.Generator().manual_seed(0)
    worlds = {d: halves_on(d, scheme, config, batch, kv_heads, head_dim, dtype) for d in ("cpu", "cuda")}
    past, packed = 0, [0, 0]
    for q_len in STEPS:
        query = torch.randn(batch, heads, q_len, head_dim, generator=generator).to(dtype)
        key, value = torch.randn(2, batch, kv_heads, q_len, head_dim, generator=generator).to(dtype)
        key[:, :, :, 3] += 8.0
        key[:, :, q_len // 2] *= 0.05
        mask = None
        if masked or q_len > 1:
            columns = torch.arange(past + q_len)
            rows = past + torch.arange(q_len)
            mask = (columns <= rows[:, None])[None, None].expand(batch, 1, -1, -1).clone()
            if masked:
                mask[0, :, :, :17] = False
        outputs = {}
        for device, halves in worlds.items():
            to = lambda t, device=device: None if t is None else t.to(device)  # noqa: E731
            state = [t for half in halves for t in half.tensors.values()]
            lengths = torch.tensor([[0, 0, 0], [past, *packed]], device=device)
            constants = scheme.constants(config)
            if past:
                outputs[device] = scheme.attend_op(
                    to(query), to(key), to(value), to(mask), lengths, 1, past, head_dim**-0.5, *state, *constants
                )
            scheme.append_op(to(key), to(value), to(mask), lengths, 1, *state, *constants)
        past += q_len
        packed = [scheme.packed_length(config, r, past, p) for r, p in zip(("key", "value"), packed, strict=True)]
        if outputs:
            want, got = outputs["cpu"].float(), outputs["cuda"].cpu().float()
            assert got.isfinite().all()
            assert (got - want).norm() / want.norm() < allowed
    for cpu, gpu, length in zip(worlds["cpu"], worlds["cuda"], packed, strict=True):
        for half in (cpu, gpu):
            half.high, half.packed = past, length
        want, got = cpu.read(past).float(), gpu.read(past).cpu().float()
        assert (got - want).norm() / want.norm() < 10 * allowed
        for state in ("outlier_position", "value_outlier_position", "seat_row", "value_seat_row"):
            if state in cpu.tensors and cpu.tensors[state].numel():
                positions = [half.tensors[state].cpu().sort(-1).values for half in (cpu, gpu)]
                assert (positions[0] == positions[1]).float().mean() > 0.98, "ties may be decided differently"


@pytest.mark.parametrize("name, options, batch, heads, kv_heads, head_dim", CASES)
def test_opcheck_on_gpu(name, options, batch, heads, kv_heads, head_dim):
    scheme, config = get_scheme(name), make_config(name, **options).at_layer(5)
    halves = halves_on("cuda", scheme, config, batch, kv_heads, head_dim, torch.float16)
    state = [t for half in halves for t in half.tensors.values()]
    query = torch.randn(batch, heads, 2, head_dim, device="cuda", dtype=torch.float16)
    key, value = torch.randn(2, batch, kv_heads, 2, head_dim, device="cuda", dtype=torch.float16)
    lengths = torch.zeros(1, 3, dtype=torch.int64, device="cuda")
    constants = scheme.constants(config)
    torch.library.opcheck(scheme.append_op, (key, value, None, lengths, 0, *state, *constants))
    torch.library.opcheck(
        scheme.attend_op, (query, key, value, None, lengths, 0, 0, head_dim**-0.5, *state, *constants)
    )
