"""Outputs are whole or absent, and hashes tell what changed."""

from pathlib import Path

import pytest

from longtrail.files import atomic_directory, atomic_file, hash_path, read_json, write_json


def test_a_folder_appears_whole_and_replaces_what_stood_there(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    for content in ("first", "second"):
        with atomic_directory(target) as aside:
            (aside / content).write_text(content)
            assert not (target / content).exists()
        assert [p.name for p in target.iterdir()] == [content]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_a_failed_folder_leaves_what_stood_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as aside:
        (aside / "kept").write_text("kept")
    with pytest.raises(RuntimeError, match="broke"), atomic_directory(target) as aside:
        (aside / "half").write_text("half")
        raise RuntimeError("broke")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/kept"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("old")
    with atomic_directory(tmp_path / "out") as aside:
        assert list(aside.iterdir()) == []
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_replaces_a_file_or_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with atomic_directory(tmp_path / name) as aside:
            (aside / "new").write_text("new")
        assert (tmp_path / name / "new").is_file() and not (tmp_path / name).is_symlink()
    assert (elsewhere / "precious").is_file()


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with atomic_file(target) as aside:
        aside.write_text("first")
    with pytest.raises(RuntimeError), atomic_file(target) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert target.read_text() == "first" and [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_a_file_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_equal_values_are_equal_json_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None, "é"]})
    write_json(tmp_path / "b.json", {"a": [1.5, None, "é"], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": [1.5, None, "é"], "b": 1}
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json")["b"] == 1


def test_a_hash_follows_names_and_bytes(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(content)
        return hash_path(tmp_path / name)

    base = folder("a", {"x": "1", "y/z": "2"})
    assert folder("b", {"y/z": "2", "x": "1"}) == base
    assert len({base, folder("c", {"x": "1", "y/z": "3"}), folder("d", {"x": "1", "y/w": "2"}), folder("e", {"x": "1"})}) == 4
    assert hash_path(tmp_path / "a" / "x") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
