"""A stand-in for a loaded program: the interface of `Program`, with the model itself and a stock cache behind it."""

from types import SimpleNamespace

import torch
from transformers import DynamicCache

from ottfx.artifacts.program_cache import ProgramCache


class DenseCache(ProgramCache):
    """A program's cache whose content is a stock cache of transformers."""

    def __init__(self, batch_size):
        self.dense = DynamicCache()
        self.rows = batch_size

    @property
    def length(self):
        return self.dense.get_seq_length()

    @property
    def batch_size(self):
        return self.rows

    def bytes_by_part(self):
        return {"dense": sum(layer.keys.nbytes + layer.values.nbytes for layer in self.dense.layers)}

    def crop(self, length):
        self.dense.crop(length - self.length)

    def select(self, rows):
        self.rows = len(rows)
        self.dense.reorder_cache(rows)

    def repeat_interleave(self, n):
        self.select(torch.arange(self.rows).repeat_interleave(n))


class DenseProgram:
    """A program's interface over the model itself. Positions are counted inside, from the mask."""

    device = torch.device("cpu")

    def __init__(self, model, takes_mask=True, tokenizer=None):
        self.model = model
        self.tokenizer = tokenizer
        entry = SimpleNamespace(
            config=model.config.to_dict(),
            generation_config=model.generation_config.to_dict(),
            takes_mask=takes_mask,
            vocab_size=model.config.vocab_size,
        )
        self.manifest = SimpleNamespace(model=entry)
        self.steps = []

    def new_cache(self, batch_size, max_length=0):
        return DenseCache(batch_size)

    def prefill(self, input_ids, cache, attention_mask=None):
        length = input_ids.shape[1]
        total = cache.length + length
        self.steps.append((length, attention_mask is not None))
        assert len(input_ids) == cache.batch_size
        if attention_mask is None:
            attention_mask = torch.ones(len(input_ids), total, dtype=torch.int64)
        assert attention_mask.shape == (len(input_ids), total)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return self.model(
            input_ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache.dense
        ).logits[:, -1:]

    def decode(self, input_ids, cache, attention_mask=None):
        assert input_ids.shape[1] == 1
        return self.prefill(input_ids, cache, attention_mask)

    def generate(self, *arguments, **options):
        from ottfx.artifacts.program_generation import generate

        return generate(self, *arguments, **options)
