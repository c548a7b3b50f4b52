"""A tokenizer that needs no file: one token a byte, 256 in all. Tokens 0 to 93 are the printable ASCII characters."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
"""The character that stands for each token."""


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Build it, with `options` such as a chat template."""
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
