"""Protobuf's wire format (protobuf.dev, "Encoding"), read strictly: what no writer makes is refused.

A lenient reader would see another message than the library that reads the same bytes after it: fields that
come twice are merged by some and replaced by others, and a field of another wire type is passed over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BITS: Final = 64
_FIXED: Final = {FIXED64: 8, FIXED32: 4}


class Field(NamedTuple):
    """A field of a message.

    Attributes:
        name: As in the message's definition.
        kind: ``int``, ``float``, ``double``, ``text``, ``bytes``, or the name of a message.
        repeated: Whether it may come more than once; numbers then also packed.
    """

    name: str
    kind: str
    repeated: bool = False


Messages = Mapping[str, Mapping[int, Field]]
_WIRE: Final = {"int": VARINT, "float": FIXED32, "double": FIXED64}
_NUMBERS: Final = {"float": "<f", "double": "<d"}


def parse(data: memoryview, message: str, messages: Messages) -> dict[str, Any]:
    """A message as field → value; repeated fields are lists, fields that did not come are missing.

    Args:
        data: Its bytes.
        message: Its name in ``messages``.
        messages: Message → number → field. Every message's nesting is finite: none holds itself.

    Raises:
        ValueError: Not such a message: cut off, an unknown field, one of another type, one that comes twice,
            or text that is not UTF-8.
    """
    fields = messages[message]
    found: dict[str, Any] = {}
    for number, wire, value in read_fields(data):
        field = fields.get(number)
        if field is None:
            raise ValueError(f"{message} has an unknown field, number {number}")
        if wire == BYTES and field.repeated and field.kind in _WIRE:
            found.setdefault(field.name, []).extend(_packed(value, field.kind))
            continue
        if wire != _WIRE.get(field.kind, BYTES):
            raise ValueError(f"{message}.{field.name} is of another type")
        entry = _value(value, field.kind, messages)
        if field.repeated:
            found.setdefault(field.name, []).append(entry)
        elif field.name in found:
            raise ValueError(f"{message}.{field.name} comes twice")
        else:
            found[field.name] = entry
    return found


def read_fields(message: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and content of every field: an int, or a memoryview of its bytes.

    Raises:
        ValueError: It is cut off, or has a wire type that is not in use.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        wire = key & 7
        if wire == VARINT:
            value, position = _varint(message, position)
            yield key >> 3, wire, value
            continue
        if wire == BYTES:
            length, position = _varint(message, position)
        elif wire in _FIXED:
            length = _FIXED[wire]
        else:
            raise ValueError(f"no field is of the wire type {wire}")
        if position + length > end:
            raise ValueError("a field is longer than its message")
        yield key >> 3, wire, message[position : position + length]
        position += length


def write_fields(fields: Iterable[tuple[int, int, Any]]) -> bytes:
    """The bytes of a message, of fields as `read_fields` gives them."""
    parts: list[Any] = []
    for number, wire, value in fields:
        parts.append(_as_varint(number << 3 | wire))
        if wire == VARINT:
            parts.append(_as_varint(value))
            continue
        if wire == BYTES:
            parts.append(_as_varint(len(value)))
        parts.append(value)
    return b"".join(parts)


def _as_varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def _value(value: Any, kind: str, messages: Messages) -> Any:
    if kind == "int":
        return _signed(value)
    if kind == "text":
        return str(value, "utf-8")  # its error is a ValueError
    if kind in _NUMBERS:
        return struct.unpack(_NUMBERS[kind], value)[0]
    return value if kind == "bytes" else parse(value, kind, messages)


def _packed(data: memoryview, kind: str) -> list[Any]:
    if kind in _NUMBERS:
        if len(data) % struct.calcsize(_NUMBERS[kind]):
            raise ValueError("packed numbers are cut off")
        return [number for (number,) in struct.iter_unpack(_NUMBERS[kind], data)]
    numbers, position = [], 0
    while position < len(data):
        number, position = _varint(data, position)
        numbers.append(_signed(number))
    return numbers


def _signed(number: int) -> int:
    """Protobuf's int64: two's complement."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A number below 2^64, and the position behind it."""
    value = shift = 0
    while position < len(message) and shift < _MAX_VARINT_BITS:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            if value >> _MAX_VARINT_BITS:
                break
            return value, position
    raise ValueError("a number is cut off, or too large")
