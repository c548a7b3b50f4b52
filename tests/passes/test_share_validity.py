"""What a mask says of the new tokens is computed once for the layers that share the mask, not by each append."""

from unittest import mock

import torch
from tiny_models import random_tokens, tiny_model

import ottfx
from ottfx import graph_compiler
from ottfx.ops import token_validity


def test_layers_share_what_a_mask_says_of_new_tokens():
    graphs = []

    def lower(gm, *_, **__):
        graphs.append(gm.graph)
        return gm.forward

    model = ottfx.compile(tiny_model("llama", num_hidden_layers=3), scheme="ott", bits=2)
    ids = random_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with mock.patch.object(graph_compiler, "_lower", lower):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert len(graphs) == 2
    for graph in graphs:
        appends = [node for node in graph.nodes if "append" in str(node.target)]
        (shared,) = graph.find_nodes(op="call_function", target=token_validity)
        assert len(appends) == 3 and {append.args[2] for append in appends} == {shared}
