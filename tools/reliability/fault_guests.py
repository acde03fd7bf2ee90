"""Rows in which files of others are met: links, files of users, other writers, damage, names."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from reliability.fault_checks import Try, afterwards, code_of, ending, users_lost
from reliability.fault_lab import Ended, Lab, tree

__all__ = [
    "damaged",
    "dangling_out",
    "dead_holder",
    "dumped",
    "foreign",
    "held",
    "held_pictures",
    "held_sweep",
    "link",
    "linked_out",
    "manifest_names",
    "notes",
    "race",
    "recipe_names",
    "report_names",
    "resumed",
    "sampled",
    "stage_name",
    "struck",
    "swept",
]


def link(name: str, *, there: bool = True, verb: str = "compile") -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        out, elsewhere = lab.copy(place), place / "elsewhere"
        if name == ".lock":
            elsewhere.write_text("")
        elif there:
            shutil.move(out / name, elsewhere) if (out / name).exists() else elsewhere.mkdir()
        before = tree(elsewhere) if elsewhere.is_dir() else elsewhere.read_text() if elsewhere.is_file() else None
        for path in (out / name,):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.symlink_to(elsewhere)
        ended = lab.run(*lab.verb(verb, out))
        after = tree(elsewhere) if elsewhere.is_dir() else elsewhere.read_text() if elsewhere.is_file() else None
        return [*ending(ended, 10), *(["what the link leads to has changed"] if before != after else [])]

    return try_it


def linked_out(lab: Lab, place: Path) -> list[str]:
    disk = lab.copy(place).rename(place / "disk")
    (place / "out").symlink_to("disk")
    wrong = ending(lab.run(*lab.verb("compile", place / "out")), 0)
    stays = (place / "out").is_symlink()
    return [*wrong, *([] if stays else ["the link is gone"]), *afterwards(lab, "compile", disk)]


def dangling_out(lab: Lab, place: Path) -> list[str]:
    (place / "out").symlink_to("nowhere")
    return ending(lab.run(*lab.compile("new", place / "out")), 10)


def foreign(name: str) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        file = place / "out" / name
        file.parent.mkdir(parents=True)
        file.write_text("the user's")
        ended = lab.run(*lab.quantize("new", place / "out"))
        found = [path for path in (place / "out").rglob("*") if path.is_file()]
        # a manifest that cannot be read is a damaged one or somebody else's: it is said, and not written over
        wrong = ending(ended, *((10, 3) if name == "manifest.json" else (10,)))
        if found not in ([file], [file, place / "out" / ".lock"], [place / "out" / ".lock", file]):
            wrong.append(f"the folder now holds {found}")
        return [*wrong, *([] if file.read_text() == "the user's" else ["the user's file has changed"])]

    return try_it


def notes(verb: str) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        out = lab.copy(place)
        return [*ending(lab.run(*lab.verb(verb, out)), 0), *users_lost(lab, out), *afterwards(lab, verb, out)]

    return try_it


def stage_name(lab: Lab, place: Path) -> list[str]:
    out = place / "out"
    wrong = code_of(lab.run(*lab.quantize("new", out)), 0)
    mine = out / "onnx" / "model.onnx"
    mine.parent.mkdir()
    mine.write_text("the user's")
    wrong += ending(lab.run(*lab.compile("new", out)), 10)
    return [*wrong, *([] if mine.read_text() == "the user's" else ["the user's file has changed"])]


def struck(lab: Lab, place: Path) -> list[str]:
    out = lab.copy(place)
    wrong = code_of(lab.run(*lab.verb("quantize", out)), 0)
    if (out / "onnx" / "model.onnx").exists():
        wrong.append("the network of the old recipe is still there")
    return [*wrong, *users_lost(lab, out), *afterwards(lab, "compile", out)]


def sampled(name: str) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        file = place / "pictures" / name
        file.parent.mkdir(parents=True)
        file.write_text("the user's")
        arguments = ["sample", lab.model, "--count", 1, "--steps", 2, "--out"]
        wrong = ending(lab.run(*arguments, place / "pictures"), 10)
        wrong += ending(lab.run(*arguments, place / "others"), 0) + ending(lab.run(*arguments, place / "others"), 0)
        return [*wrong, *([] if file.read_text() == "the user's" else ["the user's file has changed"])]

    return try_it


def _sweep(lab: Lab, out: Path) -> list[object]:
    return ["sensitivity", lab.model, "--recipe", lab.recipes["old"], "--workers", 1, "--out", out]


def swept(lab: Lab, place: Path) -> list[str]:
    file = place / "out" / "sensitivity.json"
    file.parent.mkdir()
    file.write_text("the user's")
    wrong = ending(lab.run(*_sweep(lab, place / "out")), 10)
    return [*wrong, *([] if file.read_text() == "the user's" else ["the user's file has changed"])]


def dumped(lab: Lab, place: Path) -> list[str]:
    from qdexport.graph.runner import dump_names
    from qdexport.passes import default_passes

    out, file = lab.copy(place), place / "dumps" / dump_names(list(default_passes()))[0]
    file.parent.mkdir()
    file.write_text("the user's")
    wrong = ending(lab.run(*lab.verb("compile", out), "--dump-passes", file.parent), 10)
    return [*wrong, *([] if file.read_text() == "the user's" else ["the user's file has changed"])]


@contextlib.contextmanager
def _held_lock(folder: Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def held(verb: str) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        out = lab.copy(place)
        with _held_lock(out):
            ended = lab.run(*lab.verb(verb, out))
        return [*ending(ended, 10), *([] if "another process" in ended.text else [ended.message[:200]])]

    return try_it


def held_pictures(lab: Lab, place: Path) -> list[str]:
    with _held_lock(place / "pictures"):
        return ending(lab.run("sample", lab.model, "--count", 1, "--steps", 2, "--out", place / "pictures"), 10)


def held_sweep(lab: Lab, place: Path) -> list[str]:
    with _held_lock(place / "out"):
        return ending(lab.run(*_sweep(lab, place / "out")), 10)


def race(lab: Lab, place: Path) -> list[str]:
    wrong: list[str] = []
    for turn in range(5):
        out = place / str(turn)
        first: list[Ended] = []

        def start(_: int, out: Path = out, first: list[Ended] = first) -> None:
            first.append(lab.run(*lab.quantize("old", out)))

        second = lab.run(*lab.quantize("old", out), meanwhile=start)
        codes = sorted([first[0].code, second.code])
        if codes not in ([0, 0], [0, 10]):
            wrong.append(f"exits {codes}")
        wrong += code_of(lab.run(*lab.quantize("old", out)), 0)
    return wrong


def dead_holder(lab: Lab, place: Path) -> list[str]:
    out = lab.copy(place)

    def kill(pid: int) -> None:
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)

    lab.run(*lab.verb("compile", out), meanwhile=kill)
    return list(afterwards(lab, "compile", out))


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2] if how == "cut" else b"")


def damaged(file: str, how: str) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        out = lab.copy(place, "new")
        _damage(out / file, how)
        ended = lab.run("export", out)
        wrong = ending(ended, 0, 2, 3, 6, 8, 10)
        if ended.code == 0 and file.startswith("checkpoint/"):
            wrong.append("`export` used it without a word")
        if (file, how) == ("manifest.json", "gone"):  # then nothing says that the folder is ours
            return [*wrong, *ending(lab.run(*lab.compile("new", out)), 10)]
        return [*wrong, *afterwards(lab, "compile", out)]

    return try_it


def resumed(how: str) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        out = lab.copy(place, "new")
        for path in (out / ".calibration").glob("calibration*.safetensors"):
            _damage(path, how)
        ended = lab.run(*lab.quantize("new", out, "--force"))
        shutil.rmtree(out / "checkpoint" / "unet")
        return [*ending(ended, 0), *afterwards(lab, "compile", out)]

    return try_it


def _victim(place: Path) -> Path:
    victim = place / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("the user's")
    return victim


def manifest_names(name: str) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:

        out, victim = lab.copy(place), _victim(place)
        manifest = json.loads((out / "manifest.json").read_text())
        for item in manifest["artifacts"]:
            if item["kind"] in ("onnx", "golden"):
                item["path"] = name.replace("/victim", str(victim)) if name.startswith("/") else name
        (out / "manifest.json").write_text(json.dumps(manifest))
        wrong = [text for verb in ("export", "validate") for text in ending(lab.run(verb, out, "--force"), 2, 3, 10)]
        wrong += ending(lab.run("sample", out, "--count", 1, "--out", place / "pictures"), 2, 3, 10)
        return [*wrong, *([] if (victim / "thesis.txt").is_file() else ["the folder beside OUT is gone"])]

    return try_it


def report_names(lab: Lab, place: Path) -> list[str]:

    out, victim = lab.copy(place), _victim(place)
    report = json.loads((out / "report.json").read_text())
    entry = {"class_name": "x", "body": "fp16", "why_body": "x", "usage": "x", "nodes": 1, "onnx_bytes": 1}
    report["companions"] = {"../victim": entry}
    (out / "report.json").write_text(json.dumps(report))
    ended = lab.run("export", out, "--force")
    return [*ending(ended, 0, 3, 10), *([] if (victim / "thesis.txt").is_file() else ["the folder beside OUT is gone"])]


def recipe_names(lab: Lab, place: Path) -> list[str]:
    recipe = place / "r.yaml"
    recipe.write_text(lab.recipes["old"].read_text().replace("name: old", "name: ../../victim"))
    work = place / "a" / "b"
    work.mkdir(parents=True)
    ended = lab.run("quantize", lab.model, "--recipe", recipe, "--target", "onnxruntime", before=lambda: os.chdir(work))
    found = sorted("/".join(path.relative_to(place).parts[:3]) for path in place.rglob("manifest.json"))
    return [*ending(ended, 0), *([] if found == ["a/b/qdexport-out"] else [f"manifests at {found}"])]
