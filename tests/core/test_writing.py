"""What cannot be written ends with one sentence: which path, why, and what to do; whichever library wrote."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from qdexport.core.files import atomic_dir, atomic_path, write_text
from qdexport.core.lock import locked
from qdexport.core.writing import output_errors, scratch_failure, scratch_folder, write_failure
from qdexport.errors import ModelError, OutputError


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def names(folder: Path) -> list[str]:
    return sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*"))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, r"No space left on device; free some space or choose another .* \(.* are free\)"),
        (errno.EDQUOT, "Disk quota exceeded; your share of the disk is used up"),
        (errno.EROFS, "Read-only file system; choose another output folder"),
        (errno.EACCES, "permission denied; choose another output folder"),
        (errno.EPERM, "permission denied; choose another output folder"),
        (errno.ENOTDIR, "a part of this path is a file, not a folder"),
        (errno.EEXIST, "File exists; something else has this name; move it away"),
        (errno.EISDIR, "Is a directory; a folder has the name of a file"),
        (errno.ENAMETOOLONG, "File name too long; choose an output folder with a shorter name"),
        (errno.EMFILE, "Too many open files; let this process open more files"),
        (errno.EFBIG, "File too large; let files be larger"),
        (errno.EIO, "the disk does not answer as it should"),
        (errno.EXDEV, "choose another output folder"),
    ],
)
@pytest.mark.parametrize("when", ["creating", "writing"])
def test_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str, when: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    if when == "creating":
        monkeypatch.setattr("tempfile.mkstemp", refuse)
    else:
        monkeypatch.setattr(Path, "write_text", refuse)
    path = tmp_path / "report.json"
    with pytest.raises(OutputError, match=f"cannot write {path}: .*{advice}") as caught:
        write_text(path, "text")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.exit_code == 10
    if number not in (errno.ENOSPC, errno.EDQUOT):
        assert "free some space" not in str(caught.value)
    assert names(tmp_path) == []


class LibraryError(Exception):
    """Of a library that hides what the system said."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", "No space left"),
        ('Error while serializing: IoError(Os { code: 27, kind: FileTooLarge, message: "x" })', "File too large"),
        ("Error while serializing: I/O error: Permission denied (os error 13)", "permission denied"),
        ("cannot save: Read-only file system", "Read-only"),
        ("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0: file write failed", "No space left"),
        ("basic_ios::clear: iostream error", "No space left"),
    ],
)
def test_a_library_hides_what_the_system_said(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(OutputError, match=f"cannot write {tmp_path}: {reason}"), output_errors(tmp_path):
        raise LibraryError(text)


def test_what_the_system_said_is_found_behind_an_error(tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def work() -> None:
        try:
            refuse()
        except OSError as error:
            raise LibraryError("cannot save the figure") from error

    with pytest.raises(OutputError, match="Too many open files"), output_errors(tmp_path):
        work()


@pytest.mark.parametrize(
    "error",
    [
        LibraryError("a bug"),
        LibraryError("model.safetensors: No such file or directory (os error 2)"),
        OSError("encoder error"),
        ModelError("not ours"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, output_errors(tmp_path):
        raise error
    assert caught.value is error


def test_an_error_that_was_handled_before_is_not_the_reason(tmp_path: Path) -> None:
    def work() -> None:
        try:
            (tmp_path / "optional").read_bytes()
        except FileNotFoundError:
            raise LibraryError("a bug")  # noqa: B904  that is the point

    with pytest.raises(LibraryError), output_errors(tmp_path):
        work()


def test_a_file_that_is_only_read_is_named(tmp_path: Path) -> None:
    told = r"cannot use .*/gone, which is needed to write .*/onnx: No such file"
    with pytest.raises(OutputError, match=told), atomic_dir(tmp_path / "onnx"):
        (tmp_path / "else" / "gone").read_bytes()


def test_what_is_free_and_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**10, 10**10 - 10**6, 1_500_000))
    error = OSError(errno.ENOSPC, "full")
    assert "(1.5 MB are free, about 2.5 GB are needed)" in str(write_failure(error, tmp_path / "x", 2_500_000_000))


@pytest.mark.parametrize("kind", ["text", "safetensors", "ours", "png", "npz", "onnx"])
def test_a_disk_that_is_really_full(tmp_path: Path, kind: str) -> None:
    """This process may write 4 KiB to a file at most; every library that we write with says so in its own way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own setting
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OutputError) as caught, atomic_path(tmp_path / "big.bin") as partial:
            _write(kind, partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot write {tmp_path / 'big.bin'}: File too large; let files be larger" in str(caught.value)
    assert names(tmp_path) == []


def _write(kind: str, path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    if kind == "text":
        path.write_text("x" * 100_000)
    elif kind == "safetensors":
        from safetensors.numpy import save_file

        save_file({"a": values}, path)
    elif kind == "ours":
        from qdexport.quant.stream import LazyTensor, write_safetensors

        write_safetensors(path, {"a": LazyTensor(dtype=values.dtype, shape=values.shape, make=lambda: values)}, {})
    elif kind == "png":
        from PIL import Image

        Image.fromarray(values[:90_000].view(np.uint8).reshape(300, 400, 3)).save(path, format="PNG")
    elif kind == "npz":
        with path.open("wb", buffering=0) as stream:
            np.savez(stream, a=values)
    else:
        import onnx_ir as ir

        from qdexport.emit.external import write_external

        write_external([ir.Value(name="w", const_value=ir.tensor(values))], path.parent, path.name)


def test_no_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkdtemp", refuse)
        with pytest.raises(OutputError, match=r"cannot write temporary files in .*set TMPDIR"):
            scratch_folder("qdexport-test-").__enter__()
    told = r"temporary files .*No space left on device; .*TMPDIR"
    with (
        pytest.raises(OutputError, match=told),
        scratch_folder("qdexport-test-") as folder,
        atomic_path(folder / "model.onnx"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not folder.exists()


def test_a_full_folder_of_temporary_files_is_told_from_a_full_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    free = {"tmp": 0, "out": 10**9}
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1, 1, free.get(Path(path).name, 10**9)))
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "TMPDIR" in str(write_failure(error, tmp_path / "out" / "onnx"))
    free["tmp"], free["out"] = 10**9, 0
    (tmp_path / "out").mkdir()
    assert "TMPDIR" not in str(write_failure(error, tmp_path / "out"))


@pytest.mark.rtx
def test_the_builder_says_what_it_could_not_write(tmp_path: Path) -> None:
    """The child that builds runs in a process of its own; the limit is inherited."""
    pytest.importorskip("tensorrt_rtx")
    code = f"""
import resource
from pathlib import Path
import numpy as np
import onnx_ir as ir
from qdexport.build.engine import BuildOptions, build_engine
from qdexport.core.io_spec import IoSpec
from qdexport.core.target import target_named
from qdexport.errors import OutputError
text = '<ir_version: 10, opset_import: ["": 21]> g (float[1,4] x) => (float[1,4] y) {{ y = Relu (x) }}'
ir.save(ir.from_onnx_text(text), Path({str(tmp_path)!r}) / "model.onnx")
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
options = BuildOptions(target=target_named("tensorrt-rtx"), io=IoSpec(inputs=(), outputs=()))
try:
    build_engine(Path({str(tmp_path)!r}) / "model.onnx", Path({str(tmp_path)!r}) / "engine", options)
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "File too large; let files be larger" in done.stdout, done.stdout + done.stderr


def test_an_output_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, told in (("n" * 300, "an output folder with a shorter name"), ("file/out", "cannot write .*/file/out")):
        with pytest.raises(OutputError, match=told), locked(tmp_path / name):
            pass


def test_no_folder_for_temporary_files_is_known_through_a_library() -> None:
    def export() -> None:
        try:
            raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
        except OSError as error:
            raise RuntimeError("cannot export") from error

    with pytest.raises(RuntimeError) as caught:
        export()
    failure = scratch_failure(caught.value)
    assert failure is not None
    assert "TMPDIR" in str(failure)
    assert scratch_failure(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
