"""The tables of docs/reliability.md: a small part of the hostile inputs, and of the fuzzed executions, on every run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(autouse=True, scope="module")
def tool_modules() -> Iterator[None]:
    """Makes `reliability` importable, as it is for the scripts beside it."""
    sys.path.insert(0, str(TOOLS))
    try:
        yield
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The valid inputs, and how each thirty-sixth row ended: in a process of its own, which forks."""
    seeds = tmp_path_factory.mktemp("seeds")
    command = [sys.executable, str(TOOLS / "hostile_table.py"), "--every", "36", "--seeds", str(seeds), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return seeds, json.loads(done.stdout)


def test_hostile_inputs_end_as_they_must(table: tuple[Path, list[dict[str, Any]]]) -> None:
    _, outcomes = table
    assert len(outcomes) >= 28
    assert [item for item in outcomes if item["wrong"]] == []
    assert len({item["group"] for item in outcomes}) >= 12


def test_no_fuzzed_execution_ends_uncleanly(table: tuple[Path, list[dict[str, Any]]]) -> None:
    seeds, _ = table
    fuzz_parsers = importlib.import_module("fuzz_parsers")
    run = importlib.import_module("reliability.hostile_run")
    parsers = fuzz_parsers.all_parsers(run.Seeds(seeds / "nano", seeds / "sd", seeds / "out"))
    assert len(parsers) >= 20
    counts, unclean = fuzz_parsers.fuzz(parsers, range(500))
    assert unclean == []
    assert sum(sum(count.values()) for count in counts.values()) == 500


def test_valid_inputs_are_taken(table: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """A parser that refuses what is right would make its fuzzing worthless."""
    seeds, _ = table
    fuzz = importlib.import_module("reliability.fuzz_parsers")
    run = importlib.import_module("reliability.hostile_run")
    for parser in fuzz.all_parsers(run.Seeds(seeds / "nano", seeds / "sd", seeds / "out")):
        assert parser.inputs, parser.name
        for data in parser.inputs:
            path = tmp_path / f"input{parser.suffix}"
            path.write_bytes(data)
            parser.parse(path)


def test_a_fault_is_found() -> None:
    """The judge sees what it is there for."""
    run = importlib.import_module("reliability.hostile_run")
    row = run.Row(group="g", what="w", make=lambda _: [], codes=(3,), says=("config.json",))
    good = "Error: config.json is empty; download it again\n"
    assert list(run._judged(row, 3, good)) == []
    for code, text, word in (
        (None, "", "no end"), (1, good, "exit 1"), (-11, good, "exit -11"), (3, "", "0 messages"),
        (3, good * 2, "2 messages"),
        (3, good + "Traceback (most recent call last):", "a traceback"), (3, good + "\x1b[2J", "control character"),
        (3, good.replace("config", "x"), "does not say"), (3, good + "x" * 300_000, "prints"),
        (3, good.replace("empty", "what qdexport did not foresee"), "not foreseen"),
    ):  # fmt: skip
        assert any(word in item for item in run._judged(row, code, text)), word


def test_sections_are_rewritten_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = importlib.import_module("reliability.page")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.write_section("a", "one")
    page.write_section("b", "two")
    before = page.PAGE.read_text()
    page.write_section("a", "three")
    assert page.PAGE.read_text() == before.replace("one", "three")
