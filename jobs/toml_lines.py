"""Where each key of a TOML text stands: the positions that no TOML library for Python gives.

tomllib builds values and keeps no positions; tomlkit keeps the text of every item but not its line. An error about a
film must name a line, so this module walks the text once more. It relies on tomllib having accepted the text first: it
looks for the ends of keys and values and judges nothing.

    path                       line of
    ("film", "seed")           the key `seed`
    ("shot", 1)                the second header `[[shot]]`
    ("shot", 1, "beat", 0)     the first `[[shot.beat]]` after it
    ("shot", 1, "size", 0)     the first element of the array `size`
    ("film",)                  the first mention of `film`, in a header or a dotted key
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from types import MappingProxyType

TomlPath = tuple[str | int, ...]
"""A way down a TOML document: keys of tables and indexes of arrays."""

_BLANK = re.compile(r"[ \t]*")
_BLANK_LINES = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[^ \t\n.=\]#]+")
_SCALAR = re.compile(r"[^,\]}#\n]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}(?!")'
    r"|'''.*?'{3,5}(?!')"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)


def key_lines(text: str) -> Mapping[TomlPath, int]:
    """Find the line, counted from 1, of every key, table and array element.

    Args:
        text: a TOML document that tomllib accepts.

    Returns:
        Path -> line. The paths are exactly those of the parsed document; a table mentioned several times has its first
        line, an element of an array of tables the line of its own header.
    """
    scan = _Scan(text.replace("\r\n", "\n"))
    scan.document()
    return MappingProxyType(scan.lines)


class _Scan:
    """One walk over a valid TOML text; `position` only moves forward."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[TomlPath, int] = {}
        self.num_elements: dict[TomlPath, int] = {}
        self._line = 1
        self._line_position = 0

    def document(self) -> None:
        table: TomlPath = ()
        while True:
            self._skip(_BLANK_LINES)
            if self.position >= len(self.text):
                return
            if self.text.startswith("[[", self.position):
                table = self._header(is_element=True)
            elif self.text[self.position] == "[":
                table = self._header(is_element=False)
            else:
                self._key_value(table)

    def _header(self, *, is_element: bool) -> TomlPath:
        line = self._here()
        self.position += 2 if is_element else 1
        keys = self._keys()
        self.position += 2 if is_element else 1
        path: TomlPath = ()
        for index, key in enumerate(keys):
            path = (*path, key)
            self.lines.setdefault(path, line)
            if is_element and index == len(keys) - 1:
                number = self.num_elements.get(path, 0)
                self.num_elements[path] = number + 1
                path = (*path, number)
                self.lines[path] = line
            elif path in self.num_elements:
                path = (*path, self.num_elements[path] - 1)
        return path

    def _key_value(self, table: TomlPath) -> None:
        line = self._here()
        path = table
        for key in self._keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self.position += 1  # the equals sign
        self._value(path)

    def _keys(self) -> list[str]:
        """Read a possibly dotted, possibly quoted key; leaves the position on what follows it."""
        keys = []
        while True:
            self._skip(_BLANK)
            if self.text[self.position] in "\"'":
                quoted = self._skip(_STRING)
                keys.append(next(iter(tomllib.loads(f"{quoted} = 0"))))
            else:
                keys.append(self._skip(_BARE_KEY))
            self._skip(_BLANK)
            if self.text[self.position] != ".":
                return keys
            self.position += 1

    def _value(self, path: TomlPath) -> None:
        self._skip(_BLANK)
        first = self.text[self.position]
        if first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        elif first in "\"'":
            self._skip(_STRING)
        else:
            self._skip(_SCALAR)

    def _array(self, path: TomlPath) -> None:
        self.position += 1
        number = 0
        while True:
            self._skip(_BLANK_LINES)
            if self.text[self.position] == "]":
                break
            element = (*path, number)
            self.lines[element] = self._here()
            self._value(element)
            number += 1
            self._skip(_BLANK_LINES)
            if self.text[self.position] == ",":
                self.position += 1
        self.position += 1

    def _inline_table(self, path: TomlPath) -> None:
        self.position += 1
        while True:
            self._skip(_BLANK_LINES)  # newlines and a trailing comma are TOML 1.1, which later tomllibs accept
            if self.text[self.position] == "}":
                break
            self._key_value(path)
            self._skip(_BLANK_LINES)
            if self.text[self.position] == ",":
                self.position += 1
        self.position += 1

    def _here(self) -> int:
        self._line += self.text.count("\n", self._line_position, self.position)
        self._line_position = self.position
        return self._line

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.position)
        assert match is not None, f"the scan lost its way at character {self.position}"
        self.position = match.end()
        return match.group()
