"""A TOML file with the place of everything in it, and typed reading that fails with one line: file, line, key, mend."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from longtake.jobs.toml_lines import TomlPath, key_lines
from longtake.kernels.errors import ConfigError

T = TypeVar("T")

_MAX_QUOTED = 60
_LONG_NUMBER = re.compile(r"(?:\d_?){1000}")
_TYPE_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "a table",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A parsed TOML file: values as tomllib gives them, and the line of each."""

    path: str
    document: Mapping[str, Any]
    lines: Mapping[TomlPath, int] = field(repr=False)

    def error(self, path: TomlPath, message: str) -> ConfigError:
        """An error about one key: ``film.toml:12: shot.duration: ...``.

        Args:
            path: the key; one that the file does not have is reported at the nearest table around it.
            message: what is wrong and how to mend it.
        """
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        key = ".".join(part for part in path if isinstance(part, str))
        place = f"{self.path}:{self.lines.get(known, 1)}"
        return ConfigError(one_line(f"{place}: {key}: {message}" if key else f"{place}: {message}"))


def read_source(path: str | Path) -> Source:
    """Read and parse a TOML file.

    Raises:
        ConfigError: no such file, unreadable, not UTF-8, or not TOML; with the line where there is one.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing TOML file") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from error
    return parse_source(text, str(path))


def parse_source(text: str, path: str) -> Source:
    """Parse a TOML text; ``path`` is what errors call it.

    Raises:
        ConfigError: not TOML.
    """
    try:
        document = tomllib.loads(text)
        lines = key_lines(text)
    except tomllib.TOMLDecodeError as error:
        reason = str(error)
        place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", reason)
        line = int(place[1]) if place and place[1] else text.rstrip().count("\n") + 1
        reason = reason[: place.start()] if place else reason
        column = f" at column {place[2]}" if place and place[2] else ""
        raise ConfigError(one_line(f"{path}:{line}: not TOML: {reason}{column}")) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not TOML that a film needs: nested too deeply") from error
    except ValueError as error:  # of int(), which reads no more than some thousand digits
        number = _LONG_NUMBER.search(text)
        line = text.count("\n", 0, number.start() if number else 0) + 1
        raise ConfigError(f"{path}:{line}: a number has too many digits; write one that fits in 64 bits") from error
    source = Source(path=path, document=document, lines=lines)
    _check_integers(source, (), document)
    return source


def _check_integers(source: Source, path: TomlPath, value: Any) -> None:
    """TOML's integers have 64 bits; Python's would go on, and cannot even be written out."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            _check_integers(source, (*path, key), child)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise source.error(path, "the number does not fit in 64 bits")


def one_line(text: str) -> str:
    """The text with control characters escaped, so that a message stays one line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def quote(value: object) -> str:
    """A value as it could stand in TOML, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."


def nearest(word: str, known: Sequence[str]) -> str:
    """The mend for an unknown word: the nearest known one, or all of them."""
    matches = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f'did you mean "{matches[0]}"?' if matches else f"known: {', '.join(known)}"


class Table:
    """One TOML table, read key by key. Unknown keys fail when it is opened.

    Args:
        source: the file.
        path: where the table stands in it; one that is missing reads as empty. The tables around it were opened before.
        known: every key that the table may have.
    """

    def __init__(self, source: Source, path: TomlPath, known: Sequence[str]) -> None:
        self.source = source
        self.path = path
        values: Any = source.document
        for part in path:
            values = values.get(part, {}) if isinstance(part, str) else values[part]
        if not isinstance(values, dict):
            raise source.error(path, f"must be a table, not {type_name(values)}; write it as {self._header()}")
        self._values: dict[str, Any] = values
        for key in values:
            if key not in known:
                raise self.error(key, f"unknown key; {nearest(key, known)}")

    def _header(self) -> str:
        keys = ".".join(part for part in self.path if isinstance(part, str))
        return f"[[{keys}]]" if self.path and isinstance(self.path[-1], int) else f"[{keys}]"

    def error(self, key: str, message: str) -> ConfigError:
        """An error about one key of this table."""
        return self.source.error((*self.path, key), message)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def raw(self, key: str) -> Any:
        """The value as tomllib gave it, ``None`` when the key is absent."""
        return self._values.get(key)

    def required(self, key: str, example: str) -> None:
        """Fail, with an example as the mend, when the key is absent."""
        if key not in self._values:
            raise self.error(key, f"missing; add {key} = {example}")

    def value(self, key: str, kind: type[T], example: str) -> T | None:
        """A value of exactly one type (a boolean is no integer); ``None`` when absent.

        Raises:
            ConfigError: another type.
        """
        if key not in self._values:
            return None
        value = self._values[key]
        if type(value) is not kind:
            raise self.error(key, f"must be {type_name(kind)}, not {type_name(value)}; write {key} = {example}")
        return value

    def integer(self, key: str, *, minimum: int, maximum: int, example: str) -> int | None:
        """An integer within bounds, both included."""
        value = self.value(key, int, example)
        if value is not None and not minimum <= value <= maximum:
            raise self.error(key, f"{value} is not between {minimum} and {maximum}; write {key} = {example}")
        return value

    def number(self, key: str, *, above: float | None, most: float, example: str) -> float | None:
        """A number from 0 on, or above ``above``, up to ``most``; integers are numbers too."""
        value = self._values.get(key)
        if value is None:
            return None
        if type(value) not in (int, float):
            raise self.error(key, f"must be a number, not {type_name(value)}; write {key} = {example}")
        low = 0.0 if above is None else above
        if not (low <= value <= most) or (above is not None and value == above):
            bounds = f"between 0 and {most:g}" if above is None else f"above {above:g} and at most {most:g}"
            raise self.error(key, f"{quote(value)} is not {bounds}; write {key} = {example}")
        return float(value)

    def text(self, key: str, example: str) -> str | None:
        """A string that is not blank, without blanks around it."""
        value = self.value(key, str, example)
        if value is not None and not value.strip():
            raise self.error(key, f"is empty; write {key} = {example}")
        return value.strip() if value is not None else None

    def choice(self, key: str, known: Sequence[str]) -> str | None:
        """One of a few words."""
        value = self.value(key, str, f'"{known[0]}"')
        if value is not None and value not in known:
            raise self.error(key, f"{quote(value)} is unknown; {nearest(value, known)}")
        return value

    def num_tables(self, key: str) -> int:
        """How many tables an array of tables has; 0 when absent.

        Raises:
            ConfigError: the key holds something else.
        """
        value = self._values.get(key, [])
        header = ".".join([*(part for part in self.path if isinstance(part, str)), key])
        if not isinstance(value, list):
            raise self.error(key, f"must be an array of tables, not {type_name(value)}; write [[{header}]]")
        for index, element in enumerate(value):
            if not isinstance(element, dict):
                message = f"must hold tables, not {type_name(element)}; write [[{header}]]"
                raise self.source.error((*self.path, key, index), message)
        return len(value)


def type_name(value: object) -> str:
    """A value's type (or a type) in TOML's words, with an article."""
    kind = value if isinstance(value, type) else type(value)
    return _TYPE_NAMES.get(kind, "a date or time")
