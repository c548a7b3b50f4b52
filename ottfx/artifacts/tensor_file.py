"""Tensors in the safetensors format: written piece by piece, read over a memory map."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ottfx.errors import ArtifactError, ConfigError

ALIGNMENT = 64
"""Bytes. The data, and in it every tensor whose size allows it, begins at a multiple, if the file does."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorWriter:
    """What a file of these tensors holds, before it is written.

    Tensors that are one (the same storage, offset, shape and strides) are written once.

    Args:
        tensors: on any device; one at a time is copied to the host.

    Attributes:
        aliases: name -> the name under which the same tensor is written.
        strides: of written tensors that are not contiguous; the file holds them contiguous.
        bytes: size of the file.

    Raises:
        ConfigError: a tensor has a dtype or a layout that the format does not know, or holds no data.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.aliases: dict[str, str] = {}
        self.strides: dict[str, tuple[int, ...]] = {}
        first: dict[object, str] = {}
        written: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            _check(name, tensor)
            place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
            same = first.setdefault((*place, tensor.dtype, tensor.shape, tensor.stride()), name)
            if same != name:
                self.aliases[name] = same
                continue
            written[name] = tensor
            if not tensor.is_contiguous():
                self.strides[name] = tensor.stride()
        # The format allows no gaps: those whose size keeps the alignment come first, then wide elements before narrow.
        order = sorted(written, key=lambda name: (written[name].nbytes % ALIGNMENT != 0, -written[name].itemsize))
        self._tensors = {name: written[name] for name in order}
        self._header = self._make_header()
        self.bytes = len(self._header) + sum(tensor.nbytes for tensor in self._tensors.values())

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Yield the file's bytes in order."""
        yield self._header
        for tensor in self._tensors.values():
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                yield flat.view(torch.uint8).numpy().data

    def _make_header(self) -> bytes:
        entries = {}
        end = 0
        for name, tensor in self._tensors.items():
            begin, end = end, end + tensor.nbytes
            entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def _check(name: str, tensor: Tensor) -> None:
    where = f"ottfx.export: weight {name!r}"
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise ConfigError(f"{where} must be an ordinary tensor with data. Got {tensor.layout} on {tensor.device}.")
    if tensor.dtype not in NAMES:
        known = ", ".join(str(dtype) for dtype in NAMES)
        raise ConfigError(
            f"{where} must be of a dtype that safetensors knows: {known}. Got {tensor.dtype}. Convert it."
        )
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ConfigError(
            f"{where} must not be expanded. Got shape {list(tensor.shape)}, strides {list(tensor.stride())}. "
            "Make it contiguous before the export."
        )


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor is. `begin` counts bytes from the start of the memory map."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def over(self, memory: mmap.mmap) -> Tensor:
        """Return the tensor over the mapped bytes, without a copy."""
        count = math.prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.begin).view(self.shape)


def read_header(memory: mmap.mmap, offset: int, size: int, where: str) -> dict[str, StoredTensor]:
    """Read the table of tensors at the start of a safetensors file.

    Args:
        memory: holds the file.
        offset: of the file in `memory`, bytes.
        size: of the file, bytes.
        where: how errors call it.

    Raises:
        ArtifactError: it is not such a file, or its table does not fit the data.
    """
    advice = "The file is damaged, or ottfx.export did not write it."
    length = int.from_bytes(memory[offset : offset + 8], "little") if size >= 8 else -1
    if not 0 <= length <= size - 8:
        raise ArtifactError(f"{where}: must be a safetensors file. Got {size} bytes that are none. {advice}")
    data, data_size = offset + 8 + length, size - 8 - length
    tensors = {}
    try:
        table = json.loads(memory[offset + 8 : data])
        for name, entry in table.items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
                raise ValueError(f"tensor {name!r} has a shape or a place that is not made of numbers from 0 on")
            if end > data_size or end - begin != math.prod(shape) * dtype.itemsize or begin % dtype.itemsize:
                raise ValueError(f"tensor {name!r} at bytes {begin} to {end} does not fit {dtype}, shape {list(shape)}")
            tensors[name] = StoredTensor(dtype=dtype, shape=shape, begin=data + begin)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{where}: must be a safetensors file whose table fits its data. Got: {error!r}. {advice}"
        ) from error
    return tensors
