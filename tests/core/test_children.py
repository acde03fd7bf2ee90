"""Nothing in the current folder is run or obeyed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdexport.core.children import child_environment, safe_path, use_safe_path

_TRAPS = ("json", "torch", "numpy", "matplotlib", "struct", "multiprocessing", "onnxruntime", "polygraphy", "qdexport")


@pytest.fixture
def trapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in _TRAPS:
        text = f"open({str(tmp_path / 'RAN')!r}, 'a').write('{name} ')\nraise SystemExit\n"
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_child_imports_nothing_from_here(trapped: Path) -> None:
    code = "import json, struct, multiprocessing, qdexport.errors; print('ok')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "ok\n"
    assert not (trapped / "RAN").exists()


def test_workers_of_a_pool_import_nothing_from_here(trapped: Path) -> None:
    # a process of its own: its workers import their main module again
    script = trapped / "elsewhere" / "main.py"
    script.parent.mkdir()
    script.write_text(
        "import concurrent.futures, multiprocessing\n"
        "from qdexport.core.children import safe_path\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with safe_path(), concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:\n"
        "        print(pool.submit(abs, -7).result())\n"
    )
    done = subprocess.run([sys.executable, str(script)], env={**child_environment(), "PYTHONSAFEPATH": ""},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "7\n"
    assert not (trapped / "RAN").exists()


def test_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with safe_path():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert "PYTHONSAFEPATH" not in os.environ


def test_settings_of_matplotlib_in_the_current_folder_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "matplotlibrc")  # whoever opens it waits for ever
    code = (
        "import os; from qdexport.core.children import use_safe_path; use_safe_path(); import matplotlib;"
        "print(os.getcwd())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=child_environment(), capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == str(tmp_path)


def test_it_can_be_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    use_safe_path()
    assert os.environ["PYTHONSAFEPATH"] == "1"
