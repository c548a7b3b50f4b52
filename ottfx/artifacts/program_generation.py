"""`generate` for a loaded program: transformers' own decoding loops, with a `Program` in the place of the model.

Nothing of a decoding loop is written here: `GenerationMixin` runs it, and sees a program as a model with a cache that
it did not make. Transformers is imported with this module, which is when `Program.generate` is called first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ottfx.artifacts.program_cache import ProgramCache
from ottfx.errors import ConfigError

if TYPE_CHECKING:
    from ottfx.artifacts.program import Program

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
"""How a program can generate: what needs no more than the logits of the last position."""

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cache_implementation": (
        (None, "dynamic"),
        "A program has a packed cache of its own: leave the option out, or pass cache=program.new_cache(...).",
    ),
    "compile_config": ((None,), "A program is compiled already: leave the option out."),
    "use_cache": ((None, True), "A program always keeps its cache: leave the option out."),
    "inputs_embeds": ((None,), "A program reads token ids: pass input_ids."),
    "output_attentions": ((None, False), "A program gives logits only: leave the option out."),
    "output_hidden_states": ((None, False), "A program gives logits only: leave the option out."),
}
"""Option -> values that a program can take, and what to do about any other."""


def generate(
    program: Program,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cache: ProgramCache | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    **options: Any,
) -> Any:
    """Continue token ids with a loaded program; see `transformers.GenerationMixin.generate` for every option.

    Greedy search, sampling and beam search, from the generation config that was exported with the model.

    Args:
        program: a loaded program.
        input_ids: int64 [batch, length], the whole text so far, padded on the left.
        attention_mask: int64 [batch, tokens of cache and input_ids together], 1 = real. None: as transformers does,
            tokens equal to `pad_token_id` are padding if they can be told from `eos_token_id`.
        cache: a cache that holds the beginning of the text, loaded by `ottfx.load_cache` or kept from an earlier call.
            It is written in place. That many tokens of `input_ids` are skipped; if `attention_mask` is so much longer
            than `input_ids`, those are new tokens only and nothing is skipped.
        generation_config: options in transformers' own form.
        streamer: gets the prompt, then each new token.
        logits_processor: further processors.
        stopping_criteria: further criteria.
        **options: such as `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `num_beams`,
            `num_return_sequences`, `eos_token_id`, `stop_strings`, `return_dict_in_generate`.

    Returns:
        int64 [batch, length + new tokens], or with `return_dict_in_generate` transformers' output object, whose
        `past_key_values` is the `ProgramCache`. It holds every token but the last.

    Raises:
        ConfigError: an option that a program cannot take, a cache of another kind or batch size, ids or a mask that
            do not go with the cache.
    """
    _check_options(options, generation_config)
    given = options.pop("past_key_values", None)
    if given is not None and cache is not None:
        raise ConfigError("ottfx.Program.generate: expected cache or past_key_values. Got both. Pass cache alone.")
    cache = given if cache is None else cache
    if not (cache is None or isinstance(cache, ProgramCache)):
        raise ConfigError(
            "ottfx.Program.generate: cache must be a ProgramCache, from program.new_cache or ottfx.load_cache. "
            f"Got {type(cache).__name__}."
        )
    _check_lengths(input_ids, attention_mask, 0 if cache is None else cache.length)
    config = program.manifest.model.generation_config or {}
    if "tokenizer" not in options and any(
        options.get(name) or getattr(generation_config, name, None) or config.get(name)
        for name in ("stop_strings", "token_healing")
    ):
        options["tokenizer"] = program.tokenizer
    generator = _Generator(program)
    output = generator.generate(
        input_ids.to(program.device),
        generation_config=generation_config,
        attention_mask=None if attention_mask is None else attention_mask.to(program.device),
        streamer=streamer,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        past_key_values=None if cache is None else _SeenCache(cache),
        **options,
    )
    if isinstance(output, ModelOutput):
        output.past_key_values = output.past_key_values.packed
    return output


class _SeenCache(Cache):
    """What transformers sees of a `ProgramCache`: its length, and what changes its sequences."""

    def __init__(self, packed: ProgramCache) -> None:
        super().__init__(layers=[])
        self.packed = packed

    @property
    def batch_size(self) -> int:
        return self.packed.batch_size

    @property
    def is_compileable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.packed.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # grows without an end

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.packed.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.packed.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.packed.repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # once a length to keep
            raise ConfigError(f"ottfx: crop takes minus the tokens to remove. Got {tokens_to_remove}.")
        self.packed.crop(self.packed.length + tokens_to_remove)

    def reset(self) -> None:
        self.packed.crop(0)


class _Generator(GenerationMixin):
    """A program in the form of a transformers model, for one call of `generate`."""

    main_input_name = "input_ids"

    def __init__(self, program: Program) -> None:
        model = program.manifest.model
        self.program = program
        self.device = program.device
        # The decoding loops ask a config for little, so a model that transformers does not know generates as well.
        limit = (model.config or {}).get("max_position_embeddings")
        self.config = PreTrainedConfig(vocab_size=model.vocab_size, max_position_embeddings=limit)
        saved = model.generation_config or {}
        self.generation_config = GenerationConfig.from_dict(
            {name: value for name, value in saved.items() if name not in _REFUSED}
        )
        self._padded = True

    def __call__(self, *arguments: Any, **options: Any) -> CausalLMOutputWithPast:
        return self.forward(*arguments, **options)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: _SeenCache | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Run one step; without a cache, as processors that ask the model once more begin, in a new one."""
        seen = _SeenCache(self.program.new_cache(len(input_ids))) if past_key_values is None else past_key_values
        step = self.program.decode if input_ids.shape[1] == 1 else self.program.prefill
        mask = attention_mask if self.program.manifest.model.takes_mask else None
        return CausalLMOutputWithPast(logits=step(input_ids, seen.packed, mask), past_key_values=seen)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: _SeenCache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool = False,
        **unused: Any,
    ) -> dict[str, Any]:
        """Return the arguments of one step. A mask that hides nothing is left out."""
        if is_first_iteration:
            self._padded = attention_mask is not None and not bool((attention_mask == 1).all())
        return {
            "input_ids": input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:],
            "attention_mask": attention_mask if self._padded else None,
            "past_key_values": past_key_values,
        }

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        seen = model_kwargs.get("past_key_values")
        if seen is None:
            model_kwargs["past_key_values"] = _SeenCache(self.program.new_cache(rows))
        elif seen.batch_size != rows:
            raise ConfigError(
                f"ottfx.Program.generate: the cache must hold {rows} sequences: batch size {batch_size} times beams or "
                f"returned sequences. Got one of {seen.batch_size}. Use cache.repeat_interleave(n) first."
            )

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: Any
    ) -> None:
        if generation_mode not in MODES:
            raise ConfigError(
                f"ottfx.Program.generate: a program gives the logits of the last position only, so it can do "
                f"{', '.join(mode.value for mode in MODES)}. Got options that mean {generation_mode.value}."
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def get_experts_implementation(self) -> dict[str, str]:
        """Return nothing: how experts are computed was decided at export."""
        return {}


def _check_options(options: dict[str, Any], generation_config: GenerationConfig | None) -> None:
    for name, (accepted, remedy) in _REFUSED.items():
        value = options.get(name, getattr(generation_config, name, None))
        if not any(value is one or value == one for one in accepted):
            raise ConfigError(f"ottfx.Program.generate: {name} cannot be {_short(value)}. {remedy}")


def _check_lengths(input_ids: Tensor, attention_mask: Tensor | None, stored: int) -> None:
    where = f"ottfx.Program.generate, cache of {stored} tokens" if stored else "ottfx.Program.generate"
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ConfigError(f"{where}: input_ids must be [batch, length]. Got {list(input_ids.shape)}.")
    length = input_ids.shape[1]
    total = length if attention_mask is None else attention_mask.shape[-1]
    if total not in (length, stored + length):
        raise ConfigError(
            f"{where}: attention_mask must cover the whole text, {stored} stored tokens and new ones. "
            f"Got {total} columns for input_ids of {length}."
        )
    if total <= stored:
        raise ConfigError(
            f"{where}: input_ids must hold the whole text so far and at least one token that is not stored. Got "
            f"{length} tokens. If they are new tokens only, pass an attention_mask of {stored + length} columns."
        )


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
