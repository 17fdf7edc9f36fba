"""Records for bulk loading, from a stream: tab-separated lines or JSON lines, one record a line.

    TSV    key TAB value                            UTF-8 or any bytes; the value may hold further tabs
    JSONL  {"key": text, "value": text}             or key_base64, value_base64 for bytes that are no UTF-8

Empty lines are passed over. Memory is bounded: a line is limited, and only as much is read as is asked for.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

LINE_BYTES_MAX = 4 * 1024 * 1024

Format = Literal["auto", "tsv", "jsonl"]


class RecordError(ValueError):
    """A line is no record; the text says which line and why."""


@dataclass(frozen=True, slots=True)
class Record:
    """A key, its value, and the number of the line, from 1."""

    line: int
    key: bytes
    value: bytes


def read_records(stream: BinaryIO, form: Format = "auto") -> Iterator[Record]:
    """Yield the records; RecordError at the first line that is none. "auto": JSON if it begins with a brace."""
    number = 0
    while raw := stream.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(raw) > LINE_BYTES_MAX:
            raise RecordError(f"line {number} is longer than {LINE_BYTES_MAX} bytes")
        line = raw.removesuffix(b"\n").removesuffix(b"\r")
        if not line:
            continue
        if form == "auto":
            form = "jsonl" if line.lstrip().startswith(b"{") else "tsv"
        key, value = _json_record(line, number) if form == "jsonl" else _tsv_record(line, number)
        if not key:
            raise RecordError(f"line {number}: the key is empty")
        yield Record(number, key, value)


def _tsv_record(line: bytes, number: int) -> tuple[bytes, bytes]:
    key, tab, value = line.partition(b"\t")
    if not tab:
        raise RecordError(f"line {number}: no tab between key and value")
    return key, value


def _json_record(line: bytes, number: int) -> tuple[bytes, bytes]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise RecordError(f"line {number}: not JSON") from None
    if not isinstance(record, dict):
        raise RecordError(f"line {number}: not a JSON object")
    unknown = record.keys() - {"key", "value", "key_base64", "value_base64"}
    if unknown:
        raise RecordError(f"line {number}: unknown fields: {', '.join(sorted(unknown))}")
    return _field(record, "key", number), _field(record, "value", number)


def _field(record: dict[str, object], name: str, number: int) -> bytes:
    text, coded = record.get(name), record.get(f"{name}_base64")
    if (text is None) == (coded is None):
        raise RecordError(f'line {number}: wants either "{name}" or "{name}_base64"')
    try:
        if isinstance(text, str):
            return text.encode()
        if isinstance(coded, str):
            return base64.b64decode(coded, validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        raise RecordError(f'line {number}: "{name}" cannot be decoded') from None
    raise RecordError(f'line {number}: "{name}" is not a text')
