from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.jobs.toml_lines import TomlPath, key_lines


def document_paths(value: Any, path: TomlPath = ()) -> set[TomlPath]:
    """Every path of a parsed document, without the root."""
    paths = {path} if path else set()
    if isinstance(value, dict):
        for key, child in value.items():
            paths |= document_paths(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            paths |= document_paths(child, (*path, index))
    return paths


def test_a_film_with_every_construct() -> None:
    text = '''# a comment with [brackets] and "quotes"
[film]   # first
title = "Har#bour = ["
model = 'mini'
size = [
    96,   # height ]
    160,
]
history.policy = "window"
history . "recent_blocks" = 6
cache = { device = "6GiB", host = "64GiB" }

[[shot]]
name = "arrival"
prompt = """
first line = [not a key]
[[shot]]
a \\""" quote"""
[[shot.beat]]
at = "12s"
[[ shot . 'beat' ]]
at = "13s"
prompt = \'\'\'literal \\
  last\'\'\'
[shot.cache]
disk = "1TiB"
[[shot]]
"name" = "quay"
at = 1979-05-27 07:32:00  # a date
beat = [{ at = "1s" }, # }
  { at = "2s" }]
'''
    lines = key_lines(text)
    assert set(lines) == document_paths(tomllib.loads(text))
    assert lines["film",] == 2
    assert lines["film", "title"] == 3
    assert lines["film", "size"] == 5
    assert lines["film", "size", 1] == 7
    assert lines["film", "history"] == 9
    assert lines["film", "history", "recent_blocks"] == 10
    assert lines["film", "cache", "host"] == 11
    assert lines["shot",] == lines["shot", 0] == 13
    assert lines["shot", 0, "prompt"] == 15
    assert lines["shot", 0, "beat", 0] == 19
    assert lines["shot", 0, "beat", 1, "at"] == 22
    assert lines["shot", 0, "beat", 1, "prompt"] == 23
    assert lines["shot", 0, "cache", "disk"] == 26
    assert lines["shot", 1] == 27
    assert lines["shot", 1, "name"] == 28
    assert lines["shot", 1, "beat", 1, "at"] == 31


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("\n\n# only a comment", {}),
        ("a.b.c = 1", {("a",): 1, ("a", "b"): 1, ("a", "b", "c"): 1}),
        ("\r\n\r\na = 1\r\n", {("a",): 3}),
        ('"" = 1\n"a.b" = 2', {("",): 1, ("a.b",): 2}),
        ('"\\u00e9" = 1', {("é",): 1}),
        ('a = """"""""\nb = 1', {("a",): 1, ("b",): 2}),
        ("a = ''''x'''''\nb = 1", {("a",): 1, ("b",): 2}),
        ('a = """\n\\\\"""\nb = 1', {("a",): 1, ("b",): 3}),
        ('a = "\\\\"\nb = "\\""\nc = 1', {("a",): 1, ("b",): 2, ("c",): 3}),
        (
            "a = [[1,2],[ # x ]\n3]]",
            {("a",): 1, ("a", 0): 1, ("a", 0, 0): 1, ("a", 0, 1): 1, ("a", 1): 1, ("a", 1, 0): 2},
        ),
        ("[x.y]\n[x]\nz = {}", {("x",): 1, ("x", "y"): 1, ("x", "z"): 3}),
        (
            "[[a.b]]\n[[a.b]]\n[a.b.c]\nd=[]",
            {
                ("a",): 1,
                ("a", "b"): 1,
                ("a", "b", 0): 1,
                ("a", "b", 1): 2,
                ("a", "b", 1, "c"): 3,
                ("a", "b", 1, "c", "d"): 4,
            },
        ),
    ],
)
def test_corner(text: str, expected: dict[TomlPath, int]) -> None:
    assert dict(key_lines(text)) == expected
    assert set(expected) == document_paths(tomllib.loads(text.replace("\r\n", "\n")))


# ---- property: a random document, written in random ways, so that every line number is known by construction


@dataclass
class Draft:
    """A text under construction and the lines it should be found to have."""

    text: str = ""
    lines: dict[TomlPath, int] = field(default_factory=dict)

    def line(self) -> int:
        return self.text.count("\n") + 1

    def note(self, path: TomlPath) -> None:
        self.lines.setdefault(path, self.line())


KEY = st.sampled_from(
    ["a", "b", "shot", "beat", "a-b", "_", "1", "", "x.y", "é", 'quo"te', "ha#sh", "[s]", "e=q", "  "]
)
SCALAR = st.sampled_from(
    [
        "1",
        "-2.5e3",
        "true",
        "1979-05-27T07:32:00Z",
        "1979-05-27 07:32:00",
        "07:32:00",
        "inf",
        '""',
        "''",
        '"# ] } ,"',
        "'\\'",
        '"\\\\"',
        '"\\""',
        '"""\n[[x]]\n# no comment\n"""',
        "'''\n\"\"\"\n'''",
        '"""a\\"""\n"b" """',
        '""" ""x"" """',
        "''''''",
    ]
)
FILLER = st.sampled_from(["", "", "", "\n", "# [c] = \"'''\n", "\n\n  # '''\n\t"])
BLANK = st.sampled_from(["", "", " ", "\t "])


def quoted(draw: st.DrawFn, key: str) -> str:
    bare = key.isascii() and key.replace("-", "a").replace("_", "a").isalnum()
    spellings = ['"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"']
    if "'" not in key:
        spellings.append(f"'{key}'")
    return draw(st.sampled_from([key] if bare and draw(st.booleans()) else spellings))


def write_key(draw: st.DrawFn, draft: Draft, base: TomlPath, keys: tuple[str, ...]) -> None:
    for index, key in enumerate(keys):
        draft.text += draw(BLANK) + ("." + draw(BLANK) if index else "")
        draft.note((*base, *keys[: index + 1]))
        draft.text += quoted(draw, key)
    draft.text += draw(BLANK)


def write_value(draw: st.DrawFn, draft: Draft, path: TomlPath, depth: int) -> None:
    kind = draw(st.sampled_from(["scalar", "scalar", "array", "table"])) if depth else "scalar"
    draft.text += draw(BLANK)
    if kind == "scalar":
        draft.text += draw(SCALAR)
    elif kind == "array":
        draft.text += "["
        for index in range(draw(st.integers(0, 3))):
            draft.text += (draw(FILLER) + "," if index else "") + draw(FILLER)
            draft.note((*path, index))
            write_value(draw, draft, (*path, index), depth - 1)
        draft.text += draw(FILLER) + "]"
    else:
        draft.text += "{" + draw(BLANK)
        write_pairs(draw, draft, path, depth - 1, "," + draw(BLANK))
        draft.text += draw(BLANK) + "}"


def write_pairs(draw: st.DrawFn, draft: Draft, path: TomlPath, depth: int, separator: str) -> None:
    for index, key in enumerate(draw(st.lists(KEY, unique=True, max_size=3))):
        if separator == "\n":
            draft.text += draw(FILLER)
        elif index:
            draft.text += separator
        dotted = tuple(draw(st.lists(KEY, max_size=2)))
        write_key(draw, draft, path, (key, *dotted))
        draft.text += "="
        write_value(draw, draft, (*path, key, *dotted), depth)
        if separator == "\n":
            draft.text += draw(BLANK) + draw(st.sampled_from(["\n", "# x = ]\n"]))


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    draft = Draft()
    write_pairs(draw, draft, (), 2, "\n")
    used = {path[0] for path in draft.lines}
    num_elements: dict[str, int] = {}
    for _ in range(draw(st.integers(0, 4))):
        name = draw(KEY)
        if name in used:
            continue
        draft.text += draw(FILLER)
        if draw(st.booleans()) or name in num_elements:
            number = num_elements.get(name, 0)
            num_elements[name] = number + 1
            draft.note((name,))
            draft.note((name, number))
            draft.text += f"[[{draw(BLANK)}{quoted(draw, name)}{draw(BLANK)}]]\n"
            base: TomlPath = (name, number)
        else:
            used.add(name)
            draft.text += "["
            write_key(draw, draft, (), (name,))
            draft.text += "] # [header]\n"
            base = (name,)
        write_pairs(draw, draft, base, 2, "\n")
        if draw(st.booleans()) and not any(path[: len(base) + 1] == (*base, "sub") for path in draft.lines):
            line_base = (name, "sub")
            draft.note((*base, "sub"))
            draft.note((*base, "sub", 0))
            draft.text += f"[[{'.'.join(quoted(draw, key) for key in line_base)}]]\n"
            write_pairs(draw, draft, (*base, "sub", 0), 1, "\n")
    return draft


@given(drafts())
def test_lines_known_by_construction(draft: Draft) -> None:
    assert document_paths(tomllib.loads(draft.text)) == set(draft.lines)
    assert dict(key_lines(draft.text)) == draft.lines


@given(drafts())
def test_windows_line_ends_change_nothing(draft: Draft) -> None:
    assert dict(key_lines(draft.text.replace("\n", "\r\n"))) == draft.lines
