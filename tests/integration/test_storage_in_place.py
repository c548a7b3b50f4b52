"""Inductor lets the append write into the cache: a copy of it in each step would cost what the cache saves."""

import torch
from plain_decoder import plain_decoder
from torch._dynamo.utils import ReinplaceCounters

import ottfx


def test_no_step_copies_the_cache():
    model = ottfx.compile(plain_decoder(num_layers=1), scheme="ott")
    ReinplaceCounters.clear()
    with torch.no_grad():
        past = model(torch.zeros(2, 5, dtype=torch.int64))[1]
        for _ in range(3):
            past = model(torch.zeros(2, 1, dtype=torch.int64), past)[1]
    assert ReinplaceCounters.get_total_missed() == 0
    assert past[0][0].shape[2] == 8
