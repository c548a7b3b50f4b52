"""`generate` of a program gives what `generate` of the model itself gives, for every way of decoding it takes."""

import pytest
import torch
import transformers
from byte_tokenizer import ALPHABET, byte_tokenizer
from dense_program import DenseCache, DenseProgram
from tiny_models import VOCAB_SIZE, random_tokens, tiny_model
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from ottfx.artifacts.program_generation import generate
from ottfx.errors import ConfigError

NEW_TOKENS = 12


class Recorded(BaseStreamer):
    def __init__(self):
        self.chunks = []
        self.ended = False

    def put(self, value):
        self.chunks.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def padded():
    """Three sequences, two of them padded on the left."""
    ids = random_tokens(3, 20, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :1] = 0
    return ids.masked_fill(mask == 0, 0), mask


def both(model, *arguments, **options):
    """Tokens from the model's own `generate`, and from the program's, with the same seed."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    torch.manual_seed(5)
    expected = model.generate(*arguments, **options)
    torch.manual_seed(5)
    return expected, generate(DenseProgram(model), *arguments, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.4, "min_new_tokens": 4},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 7},
    ],
    ids=str,
)
def test_tokens_are_the_models_own(model, padded, options):
    ids = random_tokens(2, 17)
    expected, got = both(model, ids, **options)
    assert got.shape[1] == 17 + NEW_TOKENS
    assert torch.equal(got, expected)
    ids, mask = padded
    expected, got = both(model, ids, attention_mask=mask, **options)
    assert torch.equal(got, expected)


def test_mask_is_inferred_from_padding_tokens(model, padded):
    ids, mask = padded
    expected, got = both(model, ids)
    assert torch.equal(got, expected)
    assert torch.equal(got, both(model, ids, attention_mask=mask)[1])


def test_mask_is_left_out_where_it_hides_nothing(model, padded):
    ids, mask = padded
    program = DenseProgram(model)
    generate(program, ids, torch.ones_like(mask), max_new_tokens=3)
    assert program.steps == [(20, False), (1, False), (1, False)]
    program = DenseProgram(model)
    generate(program, ids, mask, max_new_tokens=3)
    assert program.steps == [(20, True), (1, True), (1, True)]
    program = DenseProgram(model, takes_mask=False)
    generate(program, ids, max_new_tokens=3)
    assert program.steps == [(20, False), (1, False), (1, False)], "token 0 would be taken for padding"


def test_generation_stops_at_eos(model):
    ids = random_tokens(2, 17)
    free = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    eos = [int(free[0, 19]), int(free[1, 22])]
    expected, got = both(model, ids, eos_token_id=eos, pad_token_id=0)
    assert got.shape[1] < 17 + NEW_TOKENS
    assert torch.equal(got, expected)
    model.generation_config.eos_token_id = eos
    assert torch.equal(generate(DenseProgram(model), ids, max_new_tokens=NEW_TOKENS), expected), "from the manifest"


def test_generation_config_is_taken_as_an_object(model):
    ids = random_tokens(1, 9)
    config = transformers.GenerationConfig(max_new_tokens=5, num_beams=2)
    assert torch.equal(generate(DenseProgram(model), ids, generation_config=config), model.generate(ids, config))


def test_details_are_returned(model):
    ids = random_tokens(2, 17)
    expected, got = both(model, ids, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.logits) == len(got.scores) == NEW_TOKENS
    for step in range(NEW_TOKENS):
        torch.testing.assert_close(got.logits[step], expected.logits[step])
    assert isinstance(got.past_key_values, DenseCache)
    assert got.past_key_values.length == 17 + NEW_TOKENS - 1


def test_beam_scores_are_returned(model):
    expected, got = both(model, random_tokens(2, 17), num_beams=3, return_dict_in_generate=True, output_scores=True)
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores)
    assert got.past_key_values.batch_size == 6


def test_streamer_gets_prompt_and_tokens(model):
    ids = random_tokens(1, 9)
    streamer = Recorded()
    got = generate(DenseProgram(model), ids, streamer=streamer, max_new_tokens=4)
    assert streamer.chunks == [ids.tolist(), *([token] for token in got[0, 9:].tolist())]
    assert streamer.ended


def test_processors_and_criteria_of_the_caller_are_used(model):
    ids = random_tokens(1, 9)

    def only_token_7(input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    def at_length_12(input_ids, scores):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    processors = transformers.LogitsProcessorList([only_token_7])
    criteria = transformers.StoppingCriteriaList([at_length_12])
    options = {"logits_processor": processors, "stopping_criteria": criteria}
    got = generate(DenseProgram(model), ids, max_new_tokens=9, **options)
    assert got[0, 9:].tolist() == [7, 7, 7]


@pytest.mark.parametrize("given", ["argument", "program"])
def test_stop_strings_end_the_text(given):
    tokenizer = byte_tokenizer(pad_token="!")
    model = tiny_model("llama", vocab_size=256)
    ids = random_tokens(1, 17)
    # Letters only: other bytes may be half a character, which no stop string matches.
    options = {"max_new_tokens": NEW_TOKENS, "suppress_tokens": list(range(94, 256))}
    free = model.generate(ids, **options)
    options["stop_strings"] = ALPHABET[int(free[0, 20])]
    expected = model.generate(ids, tokenizer=tokenizer, **options)
    assert expected.shape[1] < free.shape[1]
    program = DenseProgram(model, tokenizer=tokenizer if given == "program" else None)
    if given == "argument":
        options["tokenizer"] = tokenizer
    got = generate(program, ids, **options)
    assert torch.equal(got, expected)


def test_cache_skips_the_text_that_it_holds(model, padded):
    ids, mask = padded
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    program = DenseProgram(model)
    first = generate(program, ids, mask, max_new_tokens=5, return_dict_in_generate=True)
    cache = first.past_key_values
    whole = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
    program.steps.clear()
    got = generate(program, first.sequences, whole, cache=cache, max_new_tokens=NEW_TOKENS - 5)
    assert torch.equal(got, expected)
    assert program.steps[0] == (1, True), "only the last token was not stored"
    assert cache.length == 20 + NEW_TOKENS - 1


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("hidden", [0, 4])
def test_new_tokens_alone_follow_the_cache(model, name, hidden):
    ids = random_tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :hidden] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    program = DenseProgram(model)
    cache = program.new_cache(2)
    program.prefill(ids[:, :21], cache, mask[:, :21])
    got = generate(program, ids[:, 21:], mask, max_new_tokens=NEW_TOKENS, **{name: cache})
    assert torch.equal(got, expected[:, 21:])
    assert program.steps[1][0] == 9


def test_repeated_cache_branches(model):
    ids = random_tokens(1, 17)
    torch.manual_seed(5)
    expected = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=True, num_return_sequences=3)
    program = DenseProgram(model)
    cache = program.new_cache(1)
    program.prefill(ids[:, :-1], cache)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "num_return_sequences": 3}
    with pytest.raises(ConfigError, match="3 sequences.*Got one of 1.*repeat_interleave"):
        generate(program, ids, cache=cache, **options)
    cache.repeat_interleave(3)
    torch.manual_seed(5)
    assert torch.equal(generate(program, ids, cache=cache, **options), expected)


@pytest.mark.parametrize(
    ("columns", "tokens", "text"),
    [
        (None, 20, "input_ids must hold the whole text so far"),
        (None, 5, "attention_mask of 25 columns"),
        (23, 5, "attention_mask must cover the whole text, 20 stored tokens"),
        (19, 19, "input_ids must hold the whole text so far"),
    ],
)
def test_ids_and_mask_must_go_with_the_cache(columns, tokens, text):
    program = DenseProgram(tiny_model("llama"))
    cache = program.new_cache(1)
    program.prefill(random_tokens(1, 20), cache)
    mask = None if columns is None else torch.ones(1, columns, dtype=torch.int64)
    with pytest.raises(ConfigError, match=text):
        generate(program, random_tokens(1, tokens), mask, cache=cache)
    assert cache.length == 20


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cache_implementation": "static"}, "cache_implementation cannot be 'static'"),
        ({"cache_implementation": "paged"}, "cache_implementation cannot be 'paged'"),
        ({"compile_config": transformers.CompileConfig()}, "compile_config cannot be"),
        ({"generation_config": transformers.GenerationConfig(use_cache=False)}, "use_cache cannot be False"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions cannot be True"),
        ({"inputs_embeds": torch.zeros(1, 9, 64)}, "inputs_embeds cannot be a Tensor"),
        ({"past_key_values": DynamicCache()}, "cache must be a ProgramCache.*Got DynamicCache"),
        ({"cache": DenseCache(1), "past_key_values": DenseCache(1)}, "Got both"),
        ({"prompt_lookup_num_tokens": 3}, "logits of the last position only.*assisted_generation"),
        ({"assistant_model": tiny_model("llama")}, "logits of the last position only.*assisted_generation"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_program_cannot_do_is_refused(options, text):
    program = DenseProgram(tiny_model("llama"))
    with pytest.raises(ConfigError, match=text):
        generate(program, random_tokens(1, 9), **options)
    assert not program.steps


def test_misspelled_option_is_refused():
    with pytest.raises(ValueError, match="max_new_token"):
        generate(DenseProgram(tiny_model("llama")), random_tokens(1, 9), max_new_token=3)


def test_ids_must_be_a_batch():
    with pytest.raises(ConfigError, match=r"input_ids must be \[batch, length\]. Got \[9\]"):
        generate(DenseProgram(tiny_model("llama")), random_tokens(1, 9)[0])


def test_model_that_transformers_does_not_know_generates(model):
    program = DenseProgram(model)
    program.manifest.model.config = None
    program.manifest.model.generation_config = None
    ids = random_tokens(1, 9)
    options = {"max_new_tokens": 6, "num_beams": 2}
    assert program.manifest.model.vocab_size == VOCAB_SIZE
    assert torch.equal(generate(program, ids, **options), model.generate(ids, **options))


def test_exported_defaults_that_concern_a_cache_are_left_out(model):
    program = DenseProgram(model)
    program.manifest.model.generation_config |= {"cache_implementation": "static", "use_cache": False}
    ids = random_tokens(1, 9)
    assert torch.equal(generate(program, ids, max_new_tokens=6), model.generate(ids, max_new_tokens=6))
