"""Retrieval tasks: their samples, and how answers are counted."""

from types import SimpleNamespace

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import tiny_model
from transformers import DynamicCache

from ottfx.errors import ConfigError
from ottfx.eval_command import task_names
from ottfx.evaluation import default_text, evaluate
from ottfx.results import Variant, csv_table, markdown_table
from ottfx.retrieval import LINES, SOLVED_LINES, TASKS, Sample, Score, make_samples, score_samples

TOKENIZER = byte_tokenizer()
FILLER = default_text()[:2000]


def text_of(ids):
    return TOKENIZER.decode(ids.tolist())


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_repeatable_and_can_be_answered(task):
    samples = make_samples(task, TOKENIZER, FILLER, 3)
    again, others = (make_samples(task, TOKENIZER, FILLER, 3, seed) for seed in (0, 1))
    assert all(torch.equal(a.context, b.context) for a, b in zip(samples, again, strict=True))
    assert not torch.equal(samples[0].context, others[0].context)
    for sample in samples:
        answer = text_of(sample.answer)
        assert answer in text_of(sample.context) and answer not in text_of(sample.question)
        # The question ends where only the answer can follow.
        assert not text_of(sample.question).endswith(" ") and answer.startswith(" ")


def test_line_samples_ask_for_the_line_that_holds_the_answer():
    for sample in make_samples("lines", TOKENIZER, FILLER, 5):
        context, question = text_of(sample.context), text_of(sample.question)
        asked = question.splitlines()[-1]
        assert f"{asked}{text_of(sample.answer)}.\n" in context
        assert context.count("The code of") == LINES and question.count("The code of") == SOLVED_LINES + 1


@pytest.mark.parametrize("length", [512, 1024])
def test_passkeys_lie_in_a_context_of_the_length(length):
    for sample in make_samples(f"passkey-{length}", TOKENIZER, "Some words to repeat. ", 4):
        assert len(sample.context) == length
        assert text_of(sample.context).index("The pass key is") < length


def test_wrong_arguments():
    with pytest.raises(ConfigError, match="task must be one of .* Got task='poem', count=2"):
        make_samples("poem", TOKENIZER, FILLER, 2)
    with pytest.raises(ConfigError, match="Got task='copy', count=0"):
        make_samples("copy", TOKENIZER, FILLER, 0)
    with pytest.raises(ConfigError, match=r"must be among .*'all'\]. Got \['poem'\]"):
        task_names("copy,poem")
    assert task_names("all") == list(TASKS) and task_names(" copy, lines,copy") == ["copy", "lines"]
    assert task_names("") == []


class Reader(torch.nn.Module):
    """Knows some texts by heart: says the token that follows; where a text is not `known`, another one at the end."""

    def __init__(self, samples, known):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = tiny_model("llama", num_hidden_layers=1).config
        self.texts = [torch.cat([s.context, s.question, s.answer]) for s in samples]
        self.known, self.calls = known, []

    def forward(self, ids, past_key_values, use_cache):
        assert isinstance(past_key_values, DynamicCache) and use_cache
        if ids.shape[1] > 1:
            self.read, self.text = ids.shape[1], len(self.calls)
            self.calls.append(0)
        else:
            assert ids.item() == self.texts[self.text][self.read], "the right answer is fed in"
            self.read += 1
            self.calls[-1] += 1
        text = self.texts[self.text]
        logits = torch.zeros(1, ids.shape[1], 300)
        logits[0, -1, text[self.read]] = 1.0
        if not self.known[self.text] and self.read == len(text) - 1:
            logits[0, -1, 299] = 2.0
        return SimpleNamespace(logits=logits)


def test_an_answer_counts_if_all_of_it_is_right():
    samples = make_samples("copy", TOKENIZER, FILLER, 3)
    model, steps = Reader(samples, [True, False, True]), []
    score = score_samples(model, samples, lambda *step: steps.append(step))
    assert score == Score(right=2, asked=3) and str(score) == "2/3" and score.accuracy == pytest.approx(2 / 3)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    # Question and answer token by token, all but the last one.
    assert model.calls == [len(s.question) + len(s.answer) - 1 for s in samples]


def test_evaluate_asks_each_variant_through_its_cache():
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=256)
    ids = torch.randint(0, 256, (1, 60))
    sample = Sample(context=ids[0, :40], question=ids[0, 40:44], answer=ids[0, 44:46])
    with torch.no_grad():
        right = model(ids[:, :44]).logits[0, -1].argmax()
        follows = model(torch.cat([ids[0, :44], right[None]])[None]).logits[0, -1].argmax()
    known = Sample(context=sample.context, question=sample.question, answer=torch.stack([right, follows]))
    steps = []
    (result,) = evaluate(
        model, ids, [Variant(label="a", options={"scheme": "none", "lower": "eager"})], num_tokens=48, start=40,
        tasks={"one": [known, sample]}, on_step=lambda *step: steps.append(step),
    )  # fmt: skip
    assert result.tasks == {"one": Score(right=1, asked=2)}
    assert steps[-2:] == [("a, one", 1, 2), ("a, one", 2, 2)]
    assert "| one |" in markdown_table([result]) and markdown_table([result]).splitlines()[2].endswith("| 1/2 |")
    assert "one" in csv_table([result]).splitlines()[0].split(",")
