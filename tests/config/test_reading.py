"""Settings files in which a key stands twice are refused, with both lines."""

from pathlib import Path

import pytest

from longtrail.config import load_config
from longtrail.config.reading import read_settings
from longtrail.errors import ConfigError


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return read_settings(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", ["a: in line 1, and again in line 3; expected it once"]),
        ("models:\n  sasrec: {kind: sasrec}\n  sasrec: {kind: gru4rec}\n", ["models.sasrec: in line 2, and again in line 3"]),
        ("a: {b: 1, b: 1}\n", ["a.b: in line 1, and again in line 1"]),
        ("- x: 1\n- y: {z: 1,\n    z: 2}\n", ["1.y.z: in line 2, and again in line 3"]),
        ("a: 1\na: 2\n'a': 3\n", ["a: in line 1, and again in line 2", "a: in line 2, and again in line 3"]),
        ("a: &one {b: 1, b: 2}\nc: *one\n", ["a.b: in line 1"]),  # what is named again is written once
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    lines = str(error.value).splitlines()
    assert len(lines) == len(said) and all(line.startswith(f"{tmp_path / 'params.yaml'}: {start}") for line, start in zip(lines, said, strict=True))


def test_a_key_of_two_mappings_and_a_key_that_overrides_a_merged_one_are_no_repetition(tmp_path: Path) -> None:
    read_back = read(tmp_path, "a: &one {x: 1, y: 2}\nb: {<<: *one, x: 3}\nc: [{x: 1}, {x: 1}]\n1: 1\n'1': 2\n")
    assert read_back == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": [{"x": 1}, {"x": 1}], 1: 1, "1": 2}


def test_a_mapping_that_holds_itself_comes_to_an_end(tmp_path: Path) -> None:
    found = read(tmp_path, "a: &one\n  b: *one\n")
    assert isinstance(found, dict) and found["a"]["b"] is found["a"]


def test_the_settings_of_a_pipeline_are_read_so(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("training:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"training\.seed: in line 2, and again in line 3"):
        load_config(path)
