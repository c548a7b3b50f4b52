"""The tokenizer of a Gemma model in a GGUF file, where transformers makes another one of it.

Gemma's tokens are made by merging pairs, in the order of its vocabulary, and text begins with `<bos>`. Transformers
5.17 reads the vocabulary of a GGUF file as that of a unigram model without `<bos>`: text falls into other, shorter
tokens ("t ru th"), and the model's perplexity of it is several times as high, without any error. 5.23 reads it well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4
"""Types of GGUF tokens that are looked for in the text before it is cut into pairs."""


def merges_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a fast tokenizer merges pairs, as Gemma's does."""
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE"


def read_gemma_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer whose vocabulary a GGUF file of a Gemma model holds, with `<bos>` first."""
    from gguf import GGUFReader
    from transformers import AddedToken
    from transformers.convert_slow_tokenizer import generate_merges
    from transformers.models.gemma.tokenization_gemma import GemmaTokenizer

    fields = GGUFReader(path).fields
    tokens = [spelled(token) for token in fields["tokenizer.ggml.tokens"].contents()]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Earlier tokens are merged first.
    merges = generate_merges(vocabulary, {token: -index for token, index in vocabulary.items()})
    fields_of = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names = {name: tokens[fields[f"tokenizer.ggml.{field}_token_id"].contents()] for name, field in fields_of.items()}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, **names)
    whole = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(whole)
    return tokenizer


def spelled(token: str) -> str:
    """Return a token of a GGUF file as the tokenizer spells it: runs of spaces are written as they are there."""
    return "▁" * len(token) if token.strip(" ") == "" else token
