"""Gemma's tokenizer out of a GGUF file: as transformers reads it where it reads it well."""

import pytest
from transformers import AutoTokenizer

from ottfx import models
from ottfx.gemma_tokenizer import merges_pairs, read_gemma_tokenizer

gguf = pytest.importorskip("gguf")

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
TOKENS = [
    *SPECIAL, "<0x0A>", "<start_of_turn>", "  ", "tr", "he", "\u2581t", "uth", "tru", "\u2581the", "truth",
    "\u2581truth", *"truhe\u2581",
]  # fmt: skip
CONTROL, USER_DEFINED, BYTE, NORMAL = 3, 4, 6, 1


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file with a small vocabulary, whose scores say nothing, as in Gemma's."""
    path = tmp_path_factory.mktemp("gemma") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-1000.0] * len(TOKENS))
    kinds = [CONTROL] * len(SPECIAL) + [BYTE, USER_DEFINED, USER_DEFINED]
    writer.add_token_types(kinds + [NORMAL] * (len(TOKENS) - len(kinds)))
    for name, token in {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}.items():
        getattr(writer, f"add_{name}_token_id")(TOKENS.index(token))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_pairs_are_merged_in_the_order_of_the_vocabulary(path):
    tokenizer = read_gemma_tokenizer(path)
    assert merges_pairs(tokenizer)
    # "tr" comes before "▁t" and "uth", so "▁truth", whose last merge would be of "▁t" and "ruth", is never reached.
    assert tokenizer.tokenize("the truth") == ["t", "he", "\u2581", "tru", "t", "h"]
    assert tokenizer("the").input_ids == [TOKENS.index(token) for token in ("<bos>", "t", "he")]


def test_tokens_that_stand_for_themselves_are_found_first(path):
    tokenizer = read_gemma_tokenizer(path)
    assert tokenizer.tokenize("the<start_of_turn>  he") == ["t", "he", "<start_of_turn>", "\u2581\u2581", "he"]
    assert tokenizer.decode(tokenizer("the truth").input_ids, skip_special_tokens=True) == "the truth"


def test_the_real_one_is_that_of_transformers():
    path = models.GEMMA3_WEIGHTS.find()
    if path is None:
        pytest.skip("no Gemma weights on this machine")
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if not merges_pairs(theirs):
        pytest.skip("this transformers reads another one")
    text = "It is a truth universally acknowledged,\n\n  that\t1,000 café\u2019s 你好 \U0001f600<end_of_turn>"
    assert read_gemma_tokenizer(path)(text).input_ids == theirs(text).input_ids
