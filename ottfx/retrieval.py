"""Tasks that need one exact detail of a long context: lines, copies and passkeys, scored through the real cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ottfx.errors import ConfigError

WORDS = (
    "river", "stone", "garden", "letter", "winter", "silver", "market", "bridge", "candle", "forest", "window",
    "basket", "island", "mirror", "orange", "pencil", "ribbon", "saddle", "tunnel", "violin", "wagon", "yellow",
    "apple", "doctor",
)  # fmt: skip
LINES, SOLVED_LINES = 24, 2
"""Lines of a context, each the code of a word; and those that the question repeats before it asks for another."""
SHOTS, COPIED_WORDS = 6, 4
"""Examples of a copy, and words of each."""
PASSKEY_LENGTHS = (512, 1024)
"""Tokens of a passkey's context."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A context, a question about it, and its only right answer, as token ids int64 [tokens]."""

    context: Tensor
    question: Tensor
    answer: Tensor


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many samples of a task were answered exactly."""

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.asked

    def __str__(self) -> str:
        return f"{self.right}/{self.asked}"


def make_samples(task: str, tokenizer: Any, filler: str, count: int, seed: int = 0) -> list[Sample]:
    """Make the samples of one task; the same for the same arguments.

    Args:
        task: one of `TASKS`.
        tokenizer: of the model.
        filler: text that surrounds a passkey; repeated if it is too short.
        count: number of samples.
        seed: of their contents.

    Raises:
        ConfigError: an unknown task, or fewer than one sample.
    """
    if task not in TASKS or count < 1:
        raise ConfigError(
            f"ottfx.make_samples: task must be one of {list(TASKS)} and count at least 1. "
            f"Got task={task!r}, count={count!r}."
        )
    generator = random.Random(f"{task} {seed}")
    make = TASKS[task]
    return [make(generator, tokenizer, filler) for _ in range(count)]


@torch.no_grad()
def score_samples(
    model: torch.nn.Module, samples: Sequence[Sample], on_sample: Callable[[int, int], None] | None = None
) -> Score:
    """Ask all samples, and count those of which every token of the answer is the model's first choice.

    The context is read as a prompt, in full precision; question and answer are decoded token by token, each over what
    the cache stores. The right answer is fed in, whatever the model would say.

    Args:
        model: a transformers causal language model, compiled or not.
        samples: of one task.
        on_sample: called with (samples done, samples in all).
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    config: Any = model.config
    right = 0
    for done, sample in enumerate(samples, start=1):
        cache = DynamicCache(config=config)
        model(sample.context[None].to(device), past_key_values=cache, use_cache=True)
        fed = torch.cat([sample.question, sample.answer])[:-1].to(device)
        chosen = []
        for token in fed:
            logits = model(token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1]
            chosen.append(logits.argmax())
        answered = torch.stack(chosen[len(sample.question) - 1 :]).cpu()
        right += int(torch.equal(answered, sample.answer))
        if on_sample is not None:
            on_sample(done, len(samples))
    return Score(right=right, asked=len(samples))


def _ids(tokenizer: Any, text: str, *, first: bool = False) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=first)["input_ids"], dtype=torch.int64)


def _sample(tokenizer: Any, context: str, question: str, answer: str) -> Sample:
    return Sample(
        context=_ids(tokenizer, context, first=True),
        question=_ids(tokenizer, question),
        answer=_ids(tokenizer, answer),
    )


def _digits(generator: random.Random) -> str:
    return "".join(str(generator.randrange(10)) for _ in range(5))


def _line_sample(generator: random.Random, tokenizer: Any, filler: str) -> Sample:
    # Models of 135 million parameters find a word and not a line number, and need to be shown how to answer.
    lines = [f"The code of {word} is {_digits(generator)}." for word in generator.sample(WORDS, LINES)]
    *solved, asked = generator.sample(lines, SOLVED_LINES + 1)
    question, answer = asked.removesuffix(".").rsplit(" ", 1)
    return _sample(tokenizer, "\n".join(lines) + "\n", "\n" + "\n".join([*solved, question]), f" {answer}")


def _copy_sample(generator: random.Random, tokenizer: Any, filler: str) -> Sample:
    rows = [" ".join(generator.sample(WORDS, COPIED_WORDS)) for _ in range(SHOTS + 1)]
    shots = "".join(f"Input: {row}\nOutput: {row}\n\n" for row in rows[:-1])
    return _sample(tokenizer, f"{shots}Input: {rows[-1]}", "\nOutput:", f" {rows[-1]}")


def _passkey_sample(length: int) -> Callable[[random.Random, Any, str], Sample]:
    def make(generator: random.Random, tokenizer: Any, filler: str) -> Sample:
        code = _digits(generator)
        needle = _ids(tokenizer, f"\n\nThe pass key is {code}. Remember it: {code} is the pass key.\n\n")
        prose = _ids(tokenizer, filler)
        wanted = length - len(needle)
        prose = prose.repeat(-(-wanted // len(prose)) + 1)
        begin = generator.randrange(len(prose) - wanted)
        # Not at the very end, where the full-precision window would hold it.
        depth = generator.randrange(wanted * 3 // 4)
        prose = prose[begin : begin + wanted]
        head = _ids(tokenizer, "", first=True)
        context = torch.cat([head, prose[:depth], needle, prose[depth:]])
        question = _ids(tokenizer, "\n\nWhat is the pass key? The pass key is")
        return Sample(context=context, question=question, answer=_ids(tokenizer, f" {code}"))

    return make


TASKS: dict[str, Callable[[random.Random, Any, str], Sample]] = {
    "lines": _line_sample,
    "copy": _copy_sample,
    **{f"passkey-{length}": _passkey_sample(length) for length in PASSKEY_LENGTHS},
}
"""Name -> how to make a sample from a generator, a tokenizer and a filler text."""
