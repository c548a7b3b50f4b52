"""The command line: its options, its report, its errors, and what the demo measures."""

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import tiny_model
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import ottfx
from ottfx import demo
from ottfx.cli import app
from ottfx.errors import ArtifactError

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture
def model():
    return tiny_model("llama", vocab_size=256)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("demo", "eval", "export", "run", "inspect"))


def test_version_is_printed():
    assert invoke("--version").exit_code == 0


def test_demo_reports_both_runs(model, tokenizer, monkeypatch):
    monkeypatch.setattr("ottfx.models.load_smollm2", lambda dtype, notify: (model, tokenizer))
    result = invoke("demo", "--prompt", "x" * 300, "--max-new-tokens", "6", "--bits", "4", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for expected in ("full precision", "ott+, 4 bits", "smaller by", "tokens/s", "codes", "prompt of 306 tokens"):
        assert expected in result.output


def test_demo_says_what_is_wrong(monkeypatch):
    def fail(dtype, notify):
        raise ArtifactError("ottfx.models: no weights here.")

    monkeypatch.setattr("ottfx.models.load_smollm2", fail)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "no weights here" in result.output


def test_full_precision_scheme_gives_equal_text(model, tokenizer):
    stages = []
    result = demo.compare(model, tokenizer, "y" * 200, scheme="none", max_new_tokens=8, on_stage=stages.append)
    assert stages == ["full", "compile", "quantized"]
    assert result.prompt_tokens == 206
    assert result.common_tokens == len(result.full.tokens) == len(result.quantized.tokens) == 8
    assert result.full.text == result.quantized.text
    # Two layers, keys and values, two heads of 16 channels, 16 bits; the last token is never stored.
    assert result.full_bytes == 2 * 2 * 2 * 16 * 2 * (206 + 8 - 1)
    assert result.quantized_bytes == sum(result.quantized_parts.values())


def test_common_tokens_stop_at_the_first_difference():
    def generation(tokens):
        return demo.Generation(
            tokens=torch.tensor(tokens),
            text="",
            cache=None,
            warm_up_seconds=0,
            first_token_seconds=0,
            tokens_per_second=0,
        )

    result = demo.Comparison(
        prompt_tokens=1,
        full=generation([5, 6, 7, 8]),
        quantized=generation([5, 6, 9, 8, 1]),
        full_bytes=1,
        quantized_bytes=1,
        quantized_parts={},
    )
    assert result.common_tokens == 2


def test_default_prompt_is_a_page_and_a_question():
    prompt = demo.default_prompt(words=450)
    assert prompt.startswith("Sir Walter Elliot, of Kellynch Hall")
    assert prompt.endswith(demo.QUESTION)
    assert 450 < len(prompt.split()) < 480


def test_real_model_answers(load_smollm2):
    model, tokenizer = load_smollm2(torch.bfloat16)
    result = demo.compare(model, tokenizer, demo.default_prompt(), max_new_tokens=24)
    assert "Walter Elliot" in result.full.text
    assert "Walter" in result.quantized.text
    assert result.full_bytes > 2 * result.quantized_bytes, "700 tokens: the residual window still weighs"
    assert ottfx.memory_footprint(result.quantized.cache).parts["codes"] > 0
