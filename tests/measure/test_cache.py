"""The cache: whole entries or none, damage reported and set aside, nowhere to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.measure.cache import Cache


def test_values_come_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.load("a", "k") is None
    cache.save("a", "k", {"x": [1, None, "é"]})
    assert Cache(tmp_path).load("a", "k") == {"x": [1, None, "é"]}


@pytest.mark.parametrize("damage", [b"", b"{", b'{"digest": "0", "value": 1}', b"[]", b"\xff"])
def test_a_damaged_value_is_set_aside(tmp_path: Path, damage: bytes) -> None:
    cache = Cache(tmp_path)
    cache.save("a", "k", 1)
    (tmp_path / "a" / "k.json").write_bytes(damage)
    with pytest.warns(UserWarning, match="damaged cache entry k.json: set aside as k.json.corrupt-1"):
        assert cache.load("a", "k") is None
    assert (tmp_path / "a" / "k.json.corrupt-1").read_bytes() == damage
    cache.save("a", "k", 2)
    assert cache.load("a", "k") == 2


def test_folders_are_made_once_and_checked(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path), []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "x.txt").write_text("whole")

    path = cache.folder("states", "k", make)
    assert cache.folder("states", "k", make) == path and len(calls) == 1
    (path / "x.txt").write_text("torn")
    with pytest.warns(UserWarning, match="set aside as k.corrupt-1"):
        assert (cache.folder("states", "k", make) / "x.txt").read_text() == "whole"
    assert len(calls) == 2


def test_a_folder_that_fails_is_not_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Cache(tmp_path).folder("states", "k", fail)
    assert [*(tmp_path / "states").iterdir()] == []


def test_a_full_disk_costs_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.measure.cache.write_atomic", full)
    with pytest.warns(UserWarning, match="not cached"):
        Cache(tmp_path).save("a", "k", 1)


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "mine"))
    assert Cache.default().root == tmp_path / "mine"
    monkeypatch.setenv("TRIMTAB_CACHE", "off")
    assert Cache.default().root is None
    monkeypatch.delenv("TRIMTAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache.default().root == tmp_path / "xdg" / "trimtab"


def test_nowhere_to_write_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="nothing is cached"):
        assert Cache.default().root is None


def test_without_a_root_nothing_is_kept() -> None:
    cache = Cache(None)
    cache.save("a", "k", 1)
    assert cache.load("a", "k") is None
    folder = cache.folder("a", "k", lambda path: (path / "x").write_text("x"))  # type: ignore[arg-type, return-value]
    assert (folder / "x").exists()
