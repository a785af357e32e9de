"""JSON of a sane size, depth and numbers is read; anything else is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qplug.errors import QplugError
from qplug.files.json_text import MAX_DEPTH, MAX_VALUES, parse_json, read_json

EITHER_WAY = {
    "nothing": ("", "Expecting value"),
    "lists within lists": ("[" * 100_000 + "]" * 100_000, f"nested more than {MAX_DEPTH} deep"),
    "mappings within mappings": ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
    "a number of 5000 digits": ("9" * 5000, "a number of more than 64 digits"),
    "a number of 65 digits": ("[-1" + "0" * 64 + "]", "a number of more than 64 digits"),
    "many values": ("[" + "1," * MAX_VALUES + "1]", f"more than {MAX_VALUES} values"),
    "half of a pair": ('{"\\ud800": 1}', "half of a surrogate pair"),
    "bytes that are not UTF-8": (b'"\xff"', "not UTF-8, at byte 1"),
}
STRICTLY = {
    "NaN": ("[NaN]", "NaN is no number of JSON"),
    "an infinity": ("-Infinity", "-Infinity is no number of JSON"),
    "a number that is too large": ("1e999", "a number that is too large"),
    "a key twice": ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("text", "complaint"), EITHER_WAY.values(), ids=EITHER_WAY)
def test_what_nobody_may_write(text: str | bytes, complaint: str, strict: bool) -> None:
    with pytest.raises(QplugError, match=r"^here: ") as caught:
        parse_json(text, "here", strict=strict)
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("text", "complaint"), STRICTLY.values(), ids=STRICTLY)
def test_what_configurations_of_models_may_write(text: str, complaint: str) -> None:
    parse_json(text, "here", strict=False)
    with pytest.raises(QplugError, match=f"^here: .*{complaint}"):
        parse_json(text, "here")


def test_what_models_have() -> None:
    assert parse_json('{"n": 1000000000000000019884624838656, "x": [{}]}', "") == {
        "n": 1000000000000000019884624838656,
        "x": [{}],
    }


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(QplugError, match=r"/config.json: is not a JSON mapping$"):
        read_json(tmp_path / "config.json")
    with pytest.raises(QplugError, match=r": has no qplug.json$"):
        read_json(tmp_path / "qplug.json")
