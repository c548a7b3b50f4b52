"""The door to ahead-of-time artifacts: `export` writes one `.pt2` that runs without the model's code."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ottfx.artifacts.archive import write_archive
from ottfx.artifacts.entries import dtype_name
from ottfx.artifacts.export_graph import KINDS, LEADING_INPUTS, FlatProgram, Layers, ModelCall, flat_program
from ottfx.artifacts.exported_programs import write_exported
from ottfx.artifacts.lower_ahead import CompiledProgram, compile_ahead
from ottfx.artifacts.machine import compute_capability_here, cpu_isa_here, versions_here
from ottfx.artifacts.manifest import (
    Manifest,
    ModelEntry,
    ProgramEntry,
    WeightsEntry,
    entry_from_site,
    state_entries,
)
from ottfx.errors import ConfigError
from ottfx.inductor_options import can_see_through_cpu_ops
from ottfx.registry import make_config
from ottfx.schemes import DEFAULT_SCHEME
from ottfx.schemes.base import SchemeConfig

WEIGHTS = ("inside", "external")
FORMATS = ("aoti", "exported")
OnStage = Callable[[str, int, int], None]
"""`on_stage(name, index, total)`: called as each stage of an export begins."""


def export(
    model: nn.Module,
    path: str | Path,
    bits: int | None = None,
    *,
    scheme: str | SchemeConfig = DEFAULT_SCHEME,
    call: ModelCall | None = None,
    weights: str = "inside",
    format: str = "aoti",
    tokenizer: Any = None,
    on_stage: OnStage | None = None,
    **scheme_options: Any,
) -> Path:
    """Compile a model ahead of time, with its packed cache, into a file that `ottfx.load` runs.

    The file holds three programs: `prefill` (a fresh prompt), `extend` (more tokens behind stored ones) and `decode`
    (one token). They are tied to the device type, on CUDA to the compute capability, and to the minor version of torch;
    batch size and lengths are free. The model is not changed.

    Args:
        model: a decoder of transformers, or any module with `call`; on the device and in the dtype to run in.
        path: the file to write, usually `*.pt2`; with `format="exported"` a folder.
        bits: as in `ottfx.compile`.
        scheme: as in `ottfx.compile`.
        call: how to call a model that is not one of transformers': see `ottfx.artifacts.export_graph.ModelCall`.
        weights: `inside` the file, or `external`: `<name>.safetensors` beside it.
        format: `aoti` compiles; `exported` writes uncompiled `torch.export` programs, for other compilers.
        tokenizer: a transformers tokenizer to carry along.
        on_stage: told what is being done, for a progress display.
        **scheme_options: as in `ottfx.compile`.

    Returns:
        The path that was written.

    Raises:
        ConfigError: an option that does not exist, or a value that cannot work.
        MatchError: an attention with a cache cannot be stored by the scheme; all are listed with their reasons.
    """
    _one_of("weights", weights, WEIGHTS)
    _one_of("format", format, FORMATS)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"ottfx.export: model must be a torch.nn.Module. Got {type(model).__name__}.")
    options = {} if bits is None else {"bits": bits}
    config = make_config(scheme, **options, **scheme_options)
    call = call or _default_call(model)
    device = _one_device(model)
    if format == "aoti" and device.type == "cpu" and not can_see_through_cpu_ops():
        raise ConfigError(
            f"ottfx.export: an artifact for the CPU needs torch 2.12 or newer. Got torch {torch.__version__}, whose "
            "Inductor may write to the cache before it reads it. Export for CUDA, or with format='exported'."
        )
    steps = ("capture", "compile") if format == "aoti" else ("capture",)
    stages = [f"{step} {kind.name}" for kind in KINDS for step in steps] + ["write"]

    def begin(stage: str) -> None:
        if on_stage is not None:
            on_stage(stage, stages.index(stage), len(stages))

    flat: dict[str, FlatProgram] = {}
    compiled: dict[str, CompiledProgram] = {}
    with _evaluating(model), tempfile.TemporaryDirectory(prefix="ottfx-export-") as folder:
        for kind in KINDS:
            begin(f"capture {kind.name}")
            flat[kind.name] = flat_program(model, call, kind, config)
            if format == "aoti":
                begin(f"compile {kind.name}")
                compiled[kind.name] = compile_ahead(flat[kind.name], Path(folder))
        begin("write")
        tensors, constants = _weights(compiled)
        manifest = _manifest(model, device, flat["decode"], constants or {name: {} for name in flat}, weights)
        if format == "exported":
            write_exported(Path(path), flat, manifest)
        else:
            files = {name: program.files for name, program in compiled.items()}
            write_archive(Path(path), manifest, files, tensors, _tokenizer_files(tokenizer))
    return Path(path)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"ottfx.export: {name} must be one of {list(valid)}. Got {name}={value!r}.")


def _default_call(model: nn.Module) -> ModelCall:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            "ottfx.export: call must be given for a model that is not one of transformers'. "
            f"Got {type(model).__name__}. Its form is ottfx.export_graph.ModelCall."
        )
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"ottfx.export: model must be a decoder. Got {type(model).__name__}, an encoder-decoder, whose "
            "cross-attention has a cache that does not grow."
        )
    return call_transformers


def call_transformers(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, past: Layers
) -> tuple[Tensor, Layers]:
    """Call a decoder of transformers as its `generate` does; see `ModelCall`.

    Layers with a sliding window keep all tokens, and see those in the window by their mask.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (key, value) in enumerate(past):
        cache.update(key, value, index)
    known = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {}
    if "position_ids" in known:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        arguments["position_ids"] = positions[:, -input_ids.shape[1] :]
    if "logits_to_keep" in known:
        arguments["logits_to_keep"] = 1
    output = model(
        input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **arguments
    )
    return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


def _one_device(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise ConfigError(
            f"ottfx.export: model must be on one device. Got {sorted(map(str, devices))}. Move it with model.to()."
        )
    return devices.pop()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _weights(compiled: Mapping[str, CompiledProgram]) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """Name the weights of all programs, each once: (name -> tensor, program -> its constant -> name)."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, dict[str, str]] = {}
    for program, result in compiled.items():
        names[program] = {}
        for constant, tensor in result.constants.items():
            name = constant.removeprefix("model.")
            known = tensors.get(name)
            if known is not None and not (known.is_set_to(tensor) or torch.equal(known, tensor)):
                name = f"{program}.{name}"
            tensors.setdefault(name, tensor)
            names[program][constant] = name
    return tensors, names


def _manifest(
    model: nn.Module, device: torch.device, decode: FlatProgram, constants: dict[str, dict[str, str]], weights: Any
) -> Manifest:
    config: Any = getattr(model, "config", None)
    generation: Any = getattr(model, "generation_config", None)
    state = state_entries(decode.sites)
    inputs = (*LEADING_INPUTS, *(entry.name for entry in state))
    return Manifest(
        versions=versions_here(),
        device_type=device.type,
        compute_capability=compute_capability_here(device),
        cpu_isa=cpu_isa_here(),
        dtype=dtype_name(decode.logits.dtype),
        model=ModelEntry(
            class_name=type(model).__name__,
            config=config.to_dict() if hasattr(config, "to_dict") else None,
            generation_config=generation.to_dict() if hasattr(generation, "to_dict") else None,
            takes_mask=True,
            vocab_size=int(decode.logits.shape[-1]),
        ),
        sites=tuple(entry_from_site(site) for site in decode.sites),
        state=state,
        programs={
            name: ProgramEntry(inputs=inputs, outputs=("logits",), constants=names) for name, names in constants.items()
        },
        weights=WeightsEntry(location=weights),
    )


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="ottfx-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return {f"tokenizer/{file.name}": file.read_bytes() for file in sorted(Path(folder).iterdir())}
