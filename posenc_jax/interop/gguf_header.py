"""The header of a GGUF file: its metadata, and where each tensor is. Specification: ggml's docs/gguf.md.

The package `gguf` reads headers too, but believes every count in them. Here no count can make a program read past the
end of a file, or wait or fill memory for more than the file holds.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_ITEMS = 1 << 22  # of all lists: Gemma's tokenizer has 1.5 million
MAX_TENSORS, MAX_AXES = 1 << 16, 4
STRING, LIST = 8, 9
# fmt: off
NUMBERS = {
    0: np.uint8, 1: np.int8, 2: np.uint16, 3: np.int16, 4: np.uint32, 5: np.int32, 6: np.float32, 7: np.bool_,
    10: np.uint64, 11: np.int64, 12: np.float64,
}
# fmt: on


class Stored(NamedTuple):
    """A tensor in a file: its first byte there, kind of numbers, and shape, whose last axis is contiguous."""

    offset: int
    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """The bytes of one row of the last axis."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return (self.shape[-1] if self.shape else 1) // block * size


class Header(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_header(path: Path) -> Header:
    """The header of a file. Raises OSError, and ValueError if it is no GGUF file, damaged or shorter than it says."""
    with open(path, "rb") as stream:
        source = _Source(stream, path.stat().st_size)
        if source.bytes(4) != MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        version = source.number(np.uint32)
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, not {' or '.join(map(str, VERSIONS))} in little-endian order")
        count, entries = source.number(np.uint64), source.number(np.uint64)
        if count > MAX_TENSORS:
            raise ValueError(f"it says that it has {count} tensors, more than {MAX_TENSORS}")
        metadata: dict[str, Any] = {}
        for _ in range(source.held(entries, 12)):
            name = source.text()
            if name in metadata:
                raise ValueError(f"it has {name} twice")
            metadata[name] = source.value(source.number(np.uint32))
        found: dict[str, Stored] = {}
        for _ in range(source.held(count, 24)):
            name = source.text()
            if name in found:
                raise ValueError(f"it has tensor {name!r} twice")
            found[name] = source.tensor(name)
        start = _aligned(stream.tell(), metadata.get("general.alignment", 32))
    tensors = {name: stored._replace(offset=start + stored.offset) for name, stored in found.items()}
    for name, stored in tensors.items():
        if stored.offset + math.prod(stored.shape[:-1]) * stored.row_bytes > source.size:
            raise ValueError(f"tensor {name!r} ends after the file does")
    return Header(metadata, tensors)


class _Source:
    """Reads values from a file one after the other. Raises ValueError where the file ends too early."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self.size, self._items = stream, size, 0

    def held(self, count: int, least_bytes: int) -> int:
        """The count, if the rest of the file can hold so many things of at least so many bytes."""
        left = self.size - self._stream.tell()
        if count * least_bytes > left:
            raise ValueError(f"it says that {count} more values follow, in {left} bytes")
        return count

    def bytes(self, count: int) -> bytes:
        return self._stream.read(self.held(count, 1))

    def number(self, kind: Any) -> Any:
        """A number. One in float32 gets its shortest form: 1e-05 for 9.999999747e-06."""
        value = np.frombuffer(self.bytes(np.dtype(kind).itemsize), np.dtype(kind).newbyteorder("<"))[0]
        return float(str(value)) if kind is np.float32 else value.item()

    def text(self) -> str:
        return self.bytes(self.number(np.uint64)).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != LIST:
            return self.number(_numbers(kind))
        kind, count = self.number(np.uint32), self.number(np.uint64)
        self._items += count
        if self._items > MAX_ITEMS:
            raise ValueError(f"its lists have more than {MAX_ITEMS} items")
        if kind == STRING:
            return [self.text() for _ in range(self.held(count, 8))]
        numbers = np.dtype(_numbers(kind)).newbyteorder("<")
        return np.frombuffer(self.bytes(count * numbers.itemsize), numbers).tolist()

    def tensor(self, name: str) -> Stored:
        """A tensor, whose offset counts from the end of the header. The file lists its axes in reverse."""
        axes = self.number(np.uint32)
        if axes > MAX_AXES:
            raise ValueError(f"tensor {name!r} has {axes} axes, more than {MAX_AXES}")
        shape = struct.unpack(f"<{axes}Q", self.bytes(8 * axes))[::-1]
        kind, offset = GGMLQuantizationType(self.number(np.uint32)), self.number(np.uint64)
        if shape and shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"tensor {name!r} of type {kind.name} has rows of {shape[-1]} numbers")
        return Stored(offset, kind, shape)


def _numbers(kind: int) -> Any:
    if kind not in NUMBERS:
        raise ValueError(f"it has a value of type {kind}, which is none that is known")
    return NUMBERS[kind]


def _aligned(offset: int, alignment: Any) -> int:
    """The first multiple of the alignment from the offset on."""
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"its general.alignment is {alignment!r}, not a power of two")
    return -(-offset // alignment) * alignment
