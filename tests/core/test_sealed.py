"""A result with a checksum is read as it was written, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdexport.core.sealed import read_sealed, write_sealed

VALUE = {"values": {10: 1.5, 2: 0.1}, "why_not": "ä", "list": [None, True, 3]}


def test_round_trip(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", VALUE)
    assert read_sealed(tmp_path / "a.json") == {**VALUE, "values": {"10": 1.5, "2": 0.1}}
    assert read_sealed(tmp_path / "none.json") is None


def test_no_flipped_bit_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """But where it changes nothing: white space, or one way to write a number for another."""
    file = tmp_path / "a.json"
    write_sealed(file, VALUE)
    whole, right = file.read_bytes(), read_sealed(file)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert read_sealed(file) in (None, right), place
    assert "a.json is damaged" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"sha256": 3}', "[" * 100_000])
def test_what_is_no_result(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read_sealed(tmp_path / "a.json") is None
    assert "worked out again" in caplog.text
