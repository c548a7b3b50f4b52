"""The opaque twins that the CPU door calls: the same results as the ops that compilers see through."""

import pytest
import torch

from ottfx.cache_state import CacheHalf
from ottfx.ops import outlined
from ottfx.registry import get_scheme, make_config
from ottfx.schemes.base import CacheShape

B, H, D = 2, 3, 32
WINDOW = {"group_size": 32, "residual_length": 32}
OPTIONS = {"kivi": WINDOW, "ott": WINDOW, "turbo": {}, "polar": {}, "polar_pairs": WINDOW, "qjl": WINDOW}


def halves(scheme, config):
    shape = CacheShape(
        batch_size=B, num_kv_heads=H, head_dim=D, pages=6, dtype=torch.float32, device=torch.device("cpu")
    )
    return [CacheHalf.allocate(scheme, config, role, shape) for role in ("key", "value")]


@pytest.mark.parametrize("name", OPTIONS)
def test_twins_agree_whether_or_not_something_is_due(name):
    scheme, config = get_scheme(name), make_config(name, **OPTIONS[name]).at_layer(5)
    append, attend = outlined(scheme.append_op), outlined(scheme.attend_op)
    assert append is not scheme.append_op and attend is not scheme.attend_op
    worlds = {False: halves(scheme, config), True: halves(scheme, config)}
    past, packed = 0, [0, 0]
    for q_len in (20, 1, 9, 70, 1, 1, 130, 1):
        key, value, query = torch.randn(3, B, H, q_len, D)
        mask = torch.ones(B, 1, q_len, past + q_len, dtype=torch.bool)
        mask[0, ..., :3] = False
        outputs = []
        for twin, world in worlds.items():
            state = [t for half in world for t in half.tensors.values()]
            lengths, constants = torch.tensor([[past, *packed]]), scheme.constants(config)
            ops = (append, attend) if twin else (scheme.append_op, scheme.attend_op)
            outputs.append(ops[1](query, key, value, mask, lengths, 0, past, 0.2, *state, *constants))
            ops[0](key, value, mask, lengths, 0, *state, *constants)
        torch.testing.assert_close(*outputs)
        for inline, called in zip(*worlds.values(), strict=True):
            for label, tensor in inline.tensors.items():
                assert torch.equal(tensor, called.tensors[label]), f"{label} after {past + q_len} tokens"
        past += q_len
        packed = [scheme.packed_length(config, r, past, p) for r, p in zip(("key", "value"), packed, strict=True)]


def test_schemes_without_a_twin_are_inlined():
    op = get_scheme("none").append_op
    assert outlined(op) is op


@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck_of_twins(name):
    scheme, config = get_scheme(name), make_config(name).at_layer(5)
    state = [t for half in halves(scheme, config) for t in half.tensors.values()]
    key, value, query = torch.randn(3, B, H, 2, D)
    common = (None, torch.zeros(1, 3, dtype=torch.int64), 0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        outlined(scheme.append_op), (key, value, *common, *state, *scheme.constants(config)), test_utils=checks
    )
    torch.library.opcheck(
        outlined(scheme.attend_op),
        (query, key, value, *common, 0, 0.2, *state, *scheme.constants(config)),
        test_utils=checks,
    )
