"""Dataclasses as JSON and back: every field must be there, none may be unknown, each of just its type.

The types are those of the dataclass, so that a new field needs no line here. The JSON Schema of a manifest is
made of the same types (`sdrt.export.schema`).
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sdrt.runtime.errors import BundleError, UsageError
from sdrt.runtime.system.untrusted import parse_json

_Record = TypeVar("_Record")
OPTIONAL: Final = "optional"  # in a field's metadata: what is None by default is left out of the file
_MAX_SHOWN: Final = 40  # characters of a value that somebody else wrote
_KINDS: Final = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


@dataclass(frozen=True, slots=True)
class JsonReader:
    """Reads one file's records; every error names the file and the field.

    Attributes:
        file: Its name in messages.
        remedy: What to do about a damaged one.
    """

    file: str
    remedy: str

    def document(self, text: str | bytes, form: str, version: int) -> dict[str, Any]:
        """The object in a text that says ``"format": form`` and this version, without these two.

        Raises:
            BundleError: It is no JSON, or says something else.
        """
        try:
            document = parse_json(text)
        except ValueError as error:
            raise BundleError(f"{self.file} is not valid JSON ({error}); {self.remedy}") from None
        if not isinstance(document, dict) or document.pop("format", None) != form:
            raise BundleError(f'{self.file} does not say "format": "{form}"; {self.remedy}')
        given = document.pop("format_version", None)
        if type(given) is not int or given != version:
            shown = repr(given)[:_MAX_SHOWN]
            newer = type(given) is int and given > version
            raise BundleError(
                f"{self.file} has format version {shown}, this sdrt reads version {version} alone: "
                f"{'upgrade sdrt' if newer else self.remedy}"
            )
        return document

    def read(self, kind: type[_Record], value: Any, where: str = "") -> _Record:
        """A value from JSON as ``kind``.

        Args:
            kind: A dataclass, from an object with just its fields; or any type that one of its fields has:
                a number, text, truth value, ``Literal``, tuple, ``dict``, ``Any``, each with or without
                ``None``. A class with ``from_dict`` reads its object itself.
            value: As JSON has it.
            where: Its path in the file, such as ``latents.factor``; empty for the whole.

        Raises:
            BundleError: It is something else.
        """
        result: _Record = self._read(kind, value, where)
        return result

    def _read(self, kind: Any, value: Any, where: str) -> Any:
        if kind is Any:
            return value
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):
            return self._one_of(arguments, value, where)
        if origin is Literal:
            if value not in arguments or type(value) not in map(type, arguments):
                raise self.wrong(where, value, f"one of {', '.join(map(str, arguments))}")
            return value
        if origin is tuple:
            return self._tuple(arguments, value, where)
        if origin in (dict, Mapping):
            items = self._plain(dict, value, where).items()
            return {key: self._read(arguments[1], entry, _inner(where, key)) for key, entry in items}
        if isinstance(kind, type) and hasattr(kind, "from_dict"):
            return kind.from_dict(self._plain(dict, value, where))
        if is_dataclass(kind):
            return self._record(kind, value, where)
        return self._plain(kind, value, where)

    def _one_of(self, kinds: Sequence[Any], value: Any, where: str) -> Any:
        """As the type of the union that fits; of several beside None only plain ones are told apart."""
        if value is None and type(None) in kinds:
            return None
        left = [kind for kind in kinds if kind is not type(None)]
        if len(left) == 1:
            return self._read(left[0], value, where)
        if type(value) not in left:
            raise self.wrong(where, value, " or ".join(_KINDS[kind] for kind in left))
        return value

    def _tuple(self, kinds: Sequence[Any], value: Any, where: str) -> tuple[Any, ...]:
        """From a list: of any length for ``(kind, ...)``, else of just these kinds."""
        given = self._plain(list, value, where)
        if kinds[-1] is Ellipsis:
            kinds = [kinds[0]] * len(given)
        if len(given) != len(kinds):
            raise BundleError(
                f"{self.file}: {where} has {len(given)} entries, not {len(kinds)}; {self.remedy}"
            )
        pairs = enumerate(zip(kinds, given, strict=True))
        return tuple(self._read(kind, entry, f"{where}[{index}]") for index, (kind, entry) in pairs)

    def _record(self, kind: Any, value: Any, where: str) -> Any:
        given, types_of = self._plain(dict, value, where), _types(kind)
        place = f"{self.file}: {where}" if where else self.file
        if unknown := sorted(set(given) - set(types_of)):
            raise BundleError(f"{place} has the unknown field {_names(unknown)}; {self.remedy}")
        optional = {entry.name for entry in fields(kind) if entry.metadata.get(OPTIONAL)}
        if missing := [name for name in types_of if name not in given and name not in optional]:
            raise BundleError(f"{place} lacks the field {_names(missing)}; {self.remedy}")
        try:
            return kind(
                **{
                    name: self._read(hint, given[name], _inner(where, name))
                    for name, hint in types_of.items()
                    if name in given
                }
            )
        except (UsageError, ValueError) as error:  # what a record says of its own values
            raise BundleError(f"{place}: {error}; {self.remedy}") from None

    def _plain(self, kind: Any, value: Any, where: str) -> Any:
        # In JSON 7 is a number like 7.5; Python's bool is an int, JSON's is not.
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is float and not _is_finite(value)):
            raise self.wrong(where, value, _KINDS[kind])
        return value

    def wrong(self, where: str, value: Any, wanted: str) -> BundleError:
        """The error of a value that is not what is wanted."""
        return BundleError(
            f"{self.file}: {where} is {str(value)[:_MAX_SHOWN]!r}, not {wanted}; {self.remedy}"
        )


def plain(value: Any) -> Any:
    """What a record is in JSON: an object for a dataclass, a list for a tuple.

    A class with ``to_dict`` says itself what it is.
    """
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if is_dataclass(value):
        return {
            entry.name: plain(getattr(value, entry.name))
            for entry in fields(value)
            if not entry.metadata.get(OPTIONAL) or getattr(value, entry.name) is not None
        }
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float holds
        return False


def _inner(where: str, name: str) -> str:
    shown = name if name.isidentifier() else repr(name[:_MAX_SHOWN])
    return f"{where}.{shown}" if where else shown


def _names(names: Sequence[str]) -> str:
    """Names as anybody may have written them, fit for a line."""
    return ", ".join(map(repr, names))[:100]


@cache
def _types(kind: Any) -> dict[str, Any]:
    """Field → type of a dataclass."""
    hints = get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in fields(kind)}
