"""The safetensors format: a length, a JSON header, the tensors' bytes one after another.

    8 bytes: n, little-endian | n bytes: {"name": {"dtype", "shape", "data_offsets"}, ...}, spaces up to 8 | data

Headers are built before the data exist, byte for byte as the `safetensors` library writes them, and parsed with every
check that can be made without reading data: a header is the word of whoever wrote the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import CheckpointError

LENGTH_BYTES = 8
ALIGNMENT = 8  # of where the data begin
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMENSIONS = 64  # torch's
MAX_ENTRIES = 2**63 - 1
METADATA_KEY = "__metadata__"
METADATA = {"format": "pt"}
# In the order in which the library sorts the tensors of a file, the widest first; within a dtype, names decide.
DTYPES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class FileTensor:
    """A tensor's place: `nbytes` bytes from `offset` on, counted from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def nbytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's entries."""
    return math.prod(shape) * dtype.itemsize


def build_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], file: str
) -> tuple[bytes, dict[str, FileTensor]]:
    """The beginning of a file with these tensors, and where each lies.

    Args:
        tensors: name -> (dtype, shape), in any order.
        file: the file's name, for the places.

    Returns:
        All bytes before the data, and the tensors' places in the order of the file.

    Raises:
        CheckpointError: a dtype or a name that the format does not know.
    """
    unknown = sorted({str(dtype) for dtype, _ in tensors.values() if dtype not in _NAMES})
    if unknown:
        raise CheckpointError(f"safetensors files cannot hold {', '.join(unknown)}. Pass one of {sorted(DTYPES)}.")
    if METADATA_KEY in tensors:
        raise CheckpointError(f"A tensor cannot be named {METADATA_KEY!r} in a safetensors file. Rename it.")
    header: dict[str, Any] = {METADATA_KEY: METADATA}
    spans = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (_RANKS[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        start, end = end, end + nbytes_of(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        spans[name] = start
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"A tensor's name is not Unicode text: {error.object[:200]!r}.") from error
    text += b" " * (-len(text) % ALIGNMENT)
    begin = LENGTH_BYTES + len(text)
    places = {
        name: FileTensor(*tensors[name], file, begin + start, nbytes_of(*tensors[name]))
        for name, start in spans.items()
    }
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, places


def parse_header(text: bytes, file: str, data_nbytes: int) -> tuple[dict[str, FileTensor], list[str]]:
    """What a header says, checked against the file's size.

    Args:
        text: the JSON.
        file: the file's name, for the places.
        data_nbytes: bytes of the file after the header.

    Returns:
        The tensors' places in the order of the header, and what is wrong, one sentence each. The places are of use only
        where nothing is.
    """
    try:
        header = read_json(text)
    except ValueError as error:
        return {}, [f"its header is not JSON: {error}"]
    metadata = header.pop(METADATA_KEY, {})
    problems = []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(f"{METADATA_KEY} is not a table of texts")
    begin = LENGTH_BYTES + len(text)
    places = {}
    for name, entry in header.items():
        fault = _fault_of(entry)
        if fault is not None:
            problems.append(f"tensor {short(name)}: {fault}")
            continue
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if end > data_nbytes:
            problems.append(
                f"tensor {short(name)}: its data end at byte {end}, {data_nbytes} are there (a truncated file?)"
            )
        places[name] = FileTensor(dtype, shape, file, begin + start, end - start)
    if not problems:
        problems = _gaps(places, begin, begin + data_nbytes)
    return places, problems


def read_json(text: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, no key twice, no NaN.

    Raises:
        ValueError: with the reason; nesting too deep for the parser is one.
    """
    if not text.startswith(b"{"):
        raise ValueError("it does not begin with '{'")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def short(name: object) -> str:
    """A name for a message."""
    text = ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(short(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {short(key)} appears twice")
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the key {short(key)} is not Unicode text") from error
        table[key] = value
    return table


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _fault_of(entry: Any) -> str | None:
    """Why an entry of a header cannot be; None where it can."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        return "no dtype, shape and data_offsets"
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"unknown dtype {short(dtype)}"
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        return f"shape {short(shape)} is not a list of at most {MAX_DIMENSIONS} sizes"
    if math.prod(max(size, 1) for size in shape) * DTYPES[dtype].itemsize > MAX_ENTRIES:
        return f"shape {short(shape)} has more entries than a tensor can have"
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_count, span)) or span[0] > span[1]:
        return f"data_offsets {short(span)} are not a begin and an end"
    needed = nbytes_of(DTYPES[dtype], tuple(shape))
    if span[1] - span[0] != needed:
        return f"{dtype} of shape {shape} takes {needed} bytes, data_offsets {span} span {span[1] - span[0]}"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_ENTRIES


def _gaps(places: Mapping[str, FileTensor], begin: int, end: int) -> list[str]:
    """Where the tensors overlap, and bytes that belong to none."""
    problems = []
    at, before = begin, ""
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if place.offset < at:
            problems.append(f"tensors {short(before)} and {short(name)} overlap by {at - place.offset} bytes")
        elif place.offset > at:
            problems.append(f"{place.offset - at} bytes before tensor {short(name)} belong to none")
        if place.offset + place.nbytes >= at:
            at, before = place.offset + place.nbytes, name
    if at < end:
        problems.append(f"{end - at} trailing bytes belong to no tensor")
    return problems
