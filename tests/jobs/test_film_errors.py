"""Films that are none: one line with the place and the mend, whatever the text."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longtake.jobs.film import load_film, parse_film
from longtake.kernels.errors import ConfigError
from tests.jobs.test_film import SHOT, START

# Each case: the text, the line that the error must name, and parts of its message (key and mend).
BAD: list[tuple[str, int, str]] = [
    ("", 1, "no shots; add [[shot]]"),
    ("\n[film]\nsede = 7\n" + SHOT, 3, 'film.sede: unknown key; did you mean "seed"?'),
    ("[fillm]\n" + SHOT, 1, 'fillm: unknown key; did you mean "film"?'),
    (SHOT + "durration = 3\n", 5, 'shot.durration: unknown key; did you mean "duration"?'),
    (SHOT + "zzz = 3\n", 5, "shot.zzz: unknown key; known: name, duration, prompt"),
    (SHOT + "[shot.history]\nsinks = 3\n", 6, 'shot.history.sinks: unknown key; did you mean "sink_blocks"?'),
    (SHOT + "cache = { gpu = '6GiB' }\n", 5, "shot.cache.gpu: unknown key; known: device, host, disk"),
    (SHOT + "cache = { tiers = 2 }\n", 5, "shot.cache.tiers: must be a table, not an integer; write tiers = { 2 ="),
    (SHOT + "cache.tiers = { two = 'bf16' }\n", 5, 'shot.cache.tiers.two: {"two": "bf16"} is no tier; write an age'),
    (SHOT + "cache.tiers = { '\u0662' = 'bf16' }\n", 5, "is no tier; write an age in blocks and a codec"),
    (SHOT + "cache.tiers = { 2 = 16 }\n", 5, 'shot.cache.tiers.2: {"2": 16} is no tier; write an age in blocks'),
    (SHOT + "cache.refresh = 4\n", 5, "shot.cache.refresh: has no meaning without tiers; add tiers or remove it"),
    (SHOT + "cache.first_blocks = 2\n", 5, "shot.cache.first_blocks: has no meaning without first; add first"),
    (SHOT + "history.prune = { keep = 0.3 }\n", 5, "shot.history.prune.recent_blocks: missing; add recent_blocks = 6"),
    (SHOT + "history.prune = { recent_blocks = 2, keep = 3 }\n", 5, "shot.history.prune.keep: 3 is not between 0"),
    (SHOT + "history.prune = { recent_blocks = 2, merge = 2 }\n", 5, "prune.merge: 2 is no window; write merge = ["),
    (SHOT + "attention = 'fp9'\n", 5, 'shot.attention: "fp9" is unknown; did you mean "fp8"?'),
    (SHOT + "attention = 'int8'\n", 5, 'shot.attention: "int8" is unknown; known: dense, fp8'),
    (SHOT + "[[shot.beat]]\nat='1s'\nprompt='p'\nend='2s'", 8, "shot.beat.end: unknown key; known: at, prompt"),
    ("film = 3\n" + SHOT, 1, "film: must be a table, not an integer; write it as [film]"),
    ("[[film]]\n" + SHOT, 1, "film: must be a table, not an array; write it as [film]"),
    ("shot = 3\n", 1, "shot: must be an array of tables, not an integer; write [[shot]]"),
    ("[shot]\nname='a'\n", 1, "shot: must be an array of tables, not a table; write [[shot]]"),
    ("shot = [\n1]\n", 2, "shot: must hold tables, not an integer; write [[shot]]"),
    (SHOT + "beat = 'x'", 5, "shot.beat: must be an array of tables, not a string; write [[shot.beat]]"),
    (SHOT + "history = 1", 5, "shot.history: must be a table, not an integer; write it as [shot.history]"),
    # names
    ("\n[[shot]]\nduration='9s'\nprompt='p'", 2, 'shot.name: missing; add name = "arrival"'),
    ("[[shot]]\nname='a b/..'\nduration='9s'\nprompt='p'", 2, 'allowed (letters, digits, \'-\' and \'_\''),
    ("[[shot]]\nname='a b/..'\nduration='9s'\nprompt='p'", 2, 'write name = "a-b"'),
    ("[[shot]]\nname='é'\nduration='9s'\nprompt='p'", 2, 'write name = "arrival"'),
    ("[[shot]]\nname='-a'\nduration='9s'\nprompt='p'", 2, 'write name = "a"'),
    ("[[shot]]\nname=''\nduration='9s'\nprompt='p'", 2, 'shot.name: ""'),
    ("[[shot]]\nname='a\u2028'\nduration='9s'\nprompt='p'", 2, 'write name = "a"'),
    (f"[[shot]]\nname='{'a' * 65}'\nduration='9s'\nprompt='p'", 2, "at most 64"),
    ("[[shot]]\nname=1\nduration='9s'\nprompt='p'", 2, "shot.name: must be a string, not an integer"),
    (SHOT + SHOT, 6, 'shot.name: "a" names a shot already (line 2)'),
    (SHOT + SHOT.replace('"a"', '"A"'), 6, "names differ in more than case"),
    (SHOT.replace('"a"', '"Director"'), 2, "own log"),
    # durations and prompts
    ("[[shot]]\nname='a'\nprompt='p'", 1, 'shot.duration: missing; add duration = "45s"'),
    (SHOT.replace("9s", "-9s"), 3, 'shot.duration: "-9s" is no duration; write it like "45s"'),
    (SHOT.replace("9s", "0s"), 3, 'shot.duration: "0s" is zero'),
    (SHOT.replace("9s", "9"), 3, 'write it like "45s"'),
    (SHOT.replace("9s", "200h"), 3, "more than a week; split the shot"),
    (SHOT.replace('"9s"', "9"), 3, "shot.duration: must be a string, not an integer"),
    (SHOT.replace('"9s"', "07:32:00"), 3, "shot.duration: must be a string, not a date or time"),
    ("[[shot]]\nname='a'\nduration='9s'", 1, "shot.prompt: missing; add prompt ="),
    (SHOT.replace('"p"', '"  "'), 4, "shot.prompt: is empty; write prompt ="),
    (SHOT.replace('"p"', "[]"), 4, "shot.prompt: must be a string, not an array"),
    # beats
    (SHOT + "[[shot.beat]]\nprompt='p'", 5, 'shot.beat.at: missing; add at = "12s"'),
    (SHOT + "[[shot.beat]]\nat='1s'", 5, "shot.beat.prompt: missing; add prompt ="),
    (SHOT + "[[shot.beat]]\nat='0s'\nprompt='p'", 6, "shot.beat.at: \"0s\" is zero"),
    (SHOT + "[[shot.beat]]\nat='-1s'\nprompt='p'", 6, "shot.beat.at: \"-1s\" is no duration"),
    (SHOT + "[[shot.beat]]\nat='9s'\nprompt='p'", 6, "is not before the shot's end (9s); lengthen the shot"),
    (SHOT + "[[shot.beat]]\nat='11s'\nprompt='p'", 6, "is not before the shot's end (9s)"),
    (
        SHOT + "[[shot.beat]]\nat='3s'\nprompt='p'\n[[shot.beat]]\nprompt='p'\nat='2s'",
        10,
        'shot.beat.at: "2s" is not after the beat before it (3s); order them by time',
    ),
    (SHOT + "[[shot.beat]]\nat='3s'\nprompt='p'\n[[shot.beat]]\nat='3s'\nprompt='p'", 9, "is not after the beat"),
    # after
    (SHOT + "after = 'b'", 5, 'shot.after: there is no shot "b"; remove it'),
    (SHOT + "after = 'bb'\n" + SHOT.replace('"a"', '"bbb"'), 5, 'there is no shot "bb"; did you mean "bbb"?'),
    (SHOT + "after = ''", 5, 'shot.after: is empty; write after = "arrival"'),
    (SHOT + "after = 'a'", 5, "shot.after: the shots wait for each other (a -> a); remove one after"),
    (
        SHOT + "after='c'\n" + SHOT.replace('"a"', '"b"') + "after='a'\n" + SHOT.replace('"a"', '"c"') + "after='b'",
        5,
        "the shots wait for each other (a -> b -> c -> a)",
    ),
    (SHOT + "after_blocks = 2", 5, "shot.after_blocks: has no meaning without after"),
    (SHOT + "after_blocks = -1", 5, "-1 is not between 0 and"),
    (SHOT + 'clip = "c.mp4"\nafter_blocks = 0', 6, "0 leaves nothing of the clip"),
    # settings
    ("[film]\nseed = -1\n" + SHOT, 2, "film.seed: -1 is not between 0 and"),
    ("[film]\nseed = true\n" + SHOT, 2, "film.seed: must be an integer, not a boolean; write seed = 7"),
    ("[film]\nseed = 1.0\n" + SHOT, 2, "film.seed: must be an integer, not a number"),
    ("[film]\nmodel = ''\n" + SHOT, 2, "film.model: is empty"),
    ("[film]\ntitle = 3\n" + SHOT, 2, "film.title: must be a string"),
    ('[film]\ntitle = "a\\nb"\n' + SHOT, 2, 'film.title: "a\\nb" is no title; write a line of at most 120 characters'),
    ('[film]\ntitle = "\\u001b[31m"\n' + SHOT, 2, 'film.title: "\\u001b[31m" is no title'),
    (f'[film]\ntitle = "{"x" * 121}"\n' + SHOT, 2, 'is no title; write a line of at most 120 characters'),
    ("[film]\nfps = 0\n" + SHOT, 2, "film.fps: 0 is not between 1 and 240"),
    ("[film]\nsteps = 0\n" + SHOT, 2, "film.steps: 0 is not between 1 and 1000"),
    (SHOT + "size = [96]", 5, "shot.size: [96] is no size; write size = [height, width], like [96, 160]"),
    (SHOT + "size = [96, 160.0]", 5, "is no size"),
    (SHOT + "size = [true, false]", 5, "is no size"),
    (SHOT + "size = [0, 160]", 5, "out of bounds"),
    (SHOT + "size = '4k'", 5, '"4k" is no size; write [height, width] or one of 480p, 720p'),
    (SHOT + "[shot.history]\npolicy = 'windows'", 6, 'policy: "windows" is unknown; did you mean "window"?'),
    (SHOT + "[shot.history]\npositions = 'rel'", 6, "shot.history.positions"),
    (SHOT + "[shot.history]\npolicy = 'full'\nrecent_blocks = 2", 7, 'has no meaning with policy = "full"'),
    (SHOT + "[shot.history]\npolicy = 'window'\nretrieved_blocks = 2", 7, 'has no meaning with policy = "window"'),
    (SHOT + "[shot.history]\nrecent_blocks = 0", 6, "0 is not between 1 and"),
    (SHOT + "[shot.history]\nsink_blocks = -1", 6, "-1 is not between 0 and"),
    ("[film.cache]\ndevice = '6GB '\nhost = '6gib'\n" + SHOT, 3, 'film.cache.host: "6gib" has the unknown unit gib'),
    ("[film.cache]\ndevice = 6\n" + SHOT, 2, 'must be a string, not an integer; write device = "6GiB"'),
    ("[film]\nseed = " + "9" * 5000 + "\n" + SHOT, 2, "a number has too many digits; write one that fits in 64 bits"),
    ("[film]\nseed = 0x" + "f" * 5000 + "\n" + SHOT, 2, "film.seed: the number does not fit in 64 bits"),
    (SHOT + "size = [96, 0x" + "f" * 5000 + "]", 5, "shot.size: the number does not fit in 64 bits"),
    (SHOT.replace("9s", "9" * 5000 + "s"), 3, '999..." is no duration; write it like "45s"'),
    (SHOT.replace("9s", "0." + "0" * 5000 + "1s"), 3, 'is no duration; write it like "45s"'),
    (SHOT + 'cache.host = "' + "9" * 5000 + 'GiB"', 5, '999..." is no byte count; write it like "6GiB"'),
    # not TOML
    ("[film]\ntitle = Harbour\n", 2, "not TOML: Invalid value at column 9"),
    ("[film]\nseed = 1\nseed = 2\n", 3, "not TOML: Cannot overwrite a value"),
    ("[film]\nseed = 1\n\nseed = 2", 4, "not TOML: Cannot overwrite a value"),
    ("[film]\n[film]\n", 2, "not TOML: Cannot declare ('film',) twice"),
    ('a = "x\n', 1, "not TOML: Illegal character"),
    ('a = """x\n\n', 1, "not TOML: "),
    ("[[shot]\n", 1, "not TOML: "),
    ('"a\\nb" = 1\n', 1, "unknown key; known: film, shot"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "message"), BAD)
def test_bad_input_is_one_line_with_place_and_mend(text: str, line: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_film(text, "dir/film.toml")
    error = str(caught.value)
    assert error.startswith(f"dir/film.toml:{line}: ")
    assert message in error
    assert len(error.splitlines()) == 1 and len(error) < 600
    assert str(pickle.loads(pickle.dumps(caught.value))) == error


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read \(No such file"):
        load_film(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_film(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"[film]\ntitle = '\xff'\n")
    with pytest.raises(ConfigError, match=r"binary\.toml:2: not UTF-8 text \(byte 0xff\)"):
        load_film(binary)


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    with pytest.raises(ConfigError):
        parse_film("a = " + "[" * 100_000)
    with pytest.raises(ConfigError):
        parse_film("a = " + "[" * 400 + "]" * 400)


@given(st.text())
@example("[film]\n[[shot]]\n[shot.beat]\n")
@example("[film]\nhistory = []\n[[shot]]\n")
@example("film.history.policy.x = 1\n[[shot]]")
def test_any_text_is_a_film_or_a_config_error(text: str) -> None:
    try:
        parse_film(text)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


JUNK = st.sampled_from(
    [
        "1",
        "-1",
        "1.5",
        "true",
        "[]",
        "[1, 2]",
        "[{}]",
        "{}",
        '""',
        '"x"',
        '"9s"',
        '"-1s"',
        "07:32:00",
        "nan",
        '"\\n"',
        "[[]]",
    ]
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *("film", "film.seed", "film.size", "film.fps", "film.history", "film.history.policy", "film.cache"),
                *("shot", "shot.name", "shot.duration", "shot.prompt", "shot.beat", "shot.beat.at", "shot.beat.prompt"),
                *("shot.after", "shot.cache.device", "shot.history", "shot.size"),
            ]
        ),
        JUNK,
        max_size=4,
    )
)
def test_junk_in_known_keys_is_a_film_or_a_config_error(junk: dict[str, str]) -> None:
    """Dotted keys on top and inline: whatever the value's type, the answer is a film or one line."""
    top = "".join(f"{key} = {value}\n" for key, value in junk.items() if not key.startswith("shot."))
    inside = "".join(f"{key[5:]} = {value}\n" for key, value in junk.items() if key.startswith("shot."))
    given_keys = {key.partition(".")[2] for key in junk}
    required = "".join(
        f'{key} = "{value}"\n'
        for key, value in {"name": "a", "duration": "9s", "prompt": "p"}.items()
        if key not in given_keys
    )
    try:
        parse_film(top + ("" if "shot" in junk else "[[shot]]\n" + required + inside))
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('image = "a.png"\nclip = "b.mp4"', "film.toml:6: shot.clip: a shot starts from one thing, and there is image"),
        ('after_blocks = 2\nimage = "a.png"', "film.toml:5: shot.after_blocks: has no meaning without after or clip"),
        ("strength = 0.5", "film.toml:5: shot.strength: has no meaning without video"),
        (
            'strength = 0\nvideo = "b.mp4"',
            "film.toml:5: shot.strength: 0 is not above 0 and at most 1; write strength =",
        ),
        ('strength = "x"\nvideo = "b.mp4"', "film.toml:5: shot.strength: must be a number, not a string"),
        ("history.jitter = -1", "film.toml:5: shot.history.jitter: -1 is not between 0 and 8"),
        ("history.head_jitter = 1", "shot.history.head_jitter: 1 is not between 0 and 0.9"),
        ("history.jitter = nan", "is not between 0 and 8"),
        ('[[shot.beat]]\nat = "1s"\nprompt = "q"\nswitch = "cutt"', 'film.toml:8: shot.beat.switch: "cutt" is unknown'),
    ],
)
def test_bad_starts_and_switches(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_film(START + text + "\n")
    assert message in str(caught.value)
