"""The net: what it records of a command, and which differences it tells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import net
from benchmarks.net_rows import DOZEN, ROWS, drawn


def test_every_row_has_a_name_of_its_own_and_the_dozen_are_rows() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) > 600
    assert len(DOZEN) == 12
    assert set(DOZEN) < set(names)


def test_a_draw_is_a_tenth_and_another_for_each_seed() -> None:
    draws = [drawn(seed, 0.1) for seed in range(20)]
    assert draws[3] == drawn(3, 0.1)
    assert len({tuple(row.name for row in draw) for draw in draws}) == 20
    assert all(0.05 * len(ROWS) < len(draw) < 0.16 * len(ROWS) for draw in draws)


def test_commands_are_recorded_with_their_codes_and_words(tmp_path: Path) -> None:
    rows = {"help-build": (0, "Usage: "), "code-2-verb": (2, "compil")}
    options = [part for name in rows for part in ("--row", name)]
    command = [sys.executable, str(Path(net.__file__)), "record", str(tmp_path), *options, "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
    for name, (code, said) in rows.items():
        first, *told = (tmp_path / name / "structure.txt").read_text().splitlines()
        assert first == f"exit code {code}"
        assert said in "\n".join(told)


def record(folder: Path, structure: str, numbers: str) -> None:
    folder.mkdir(parents=True)
    (folder / "structure.txt").write_text(structure)
    (folder / "numbers.txt").write_text(numbers)


@pytest.mark.parametrize(
    ("structure", "numbers", "options", "code"),
    [
        ("a\n== b\nc\n", "1\n", (), 0),
        ("a\n== b\nd\n", "1\n", (), 1),
        ("a\n== b\nc\n", "2\n", (), 1),
        ("a\n== b\nc\n", "2\n", ("--structure",), 0),
    ],
)
def test_differences_are_told(
    structure: str, numbers: str, options: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    record(tmp_path / "old" / "row", "a\n== b\nc\n", "1\n")
    record(tmp_path / "new" / "row", structure, numbers)
    done = CliRunner().invoke(net.cli, ["compare", str(tmp_path / "old"), str(tmp_path / "new"), *options])
    assert done.exit_code == code
    assert f"1 rows in both, {code} differ" in done.output


def test_records_that_share_no_row_prove_nothing(tmp_path: Path) -> None:
    record(tmp_path / "old" / "row", "a\n", "")
    record(tmp_path / "new" / "other", "a\n", "")
    assert CliRunner().invoke(net.cli, ["compare", str(tmp_path / "old"), str(tmp_path / "new")]).exit_code == 1


def test_a_digest_names_the_section_that_changed(tmp_path: Path) -> None:
    record(tmp_path / "row", "exit code 0\n== onnx/model.onnx\nx\ny\n", "")
    found = net.digest(tmp_path / "row" / "structure.txt")
    assert list(found) == ["said", "onnx/model.onnx"]
    assert found["onnx/model.onnx"].startswith("2 lines, ")
