"""Hostile files that users name: prompts, bit plans, ranges, forms, passes; odd kinds of files, and odd names."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from reliability.hostile_models import ESCAPE, JSONS, SAFETENSORS
from reliability.hostile_run import Place, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["file_rows"]

_PLAN = "model: m\nrecipe: r\naverage_weight_bits: 8\naverage_activation_bits: 8\nlayers:\n"
_BITS: dict[str, str | bytes] = {
    "empty": "",
    "no YAML": "[",
    "a list": "- a\n",
    "no layers": _PLAN,
    "layers: {}": _PLAN.replace("layers:", "layers: {}"),
    "an unknown layer": _PLAN + "  evil: {weight: 8, activation: 8}\n",
    "a layer with an escape": _PLAN + '  "\\e]0;owned\\a": {weight: 8, activation: 8}\n',
    "9 bits": _PLAN + "  conv_in: {weight: 9, activation: 8}\n",
    "10**30 bits": _PLAN + "  conv_in: {weight: 1" + "0" * 30 + ", activation: 8}\n",
    "bits: .nan": _PLAN + "  conv_in: {weight: .nan, activation: 8}\n",
    "half in floating point": _PLAN + "  conv_in: {weight: 16, activation: 8}\n",
    "a layer that is a list": _PLAN + "  conv_in: []\n",
    "an unknown key": _PLAN + "  conv_in: {weight: 8, activation: 8, evil: 1}\n",
    "a layer twice": _PLAN + "  conv_in: {weight: 8, activation: 8}\n" * 2,
    "not UTF-8": b"model: \xe9\n",
    "a date that there is not": "model: 2024-13-45\n" + _PLAN,
    "nested 900 levels": "layers: " + "[" * 900 + "]" * 900,
    "a number of 5000 digits": _PLAN.replace("_bits: 8", "_bits: " + "9" * 5000),
    "an object of Python": "model: !!python/name:os.system\n",
    "random bytes": bytes(range(256)),
}
_RANGES: dict[str, str | bytes] = {
    **{f"JSON: {what}": text for what, text in JSONS.items()},
    "an unknown layer": '{"evil": [0, 1]}',
    "a layer with an escape": json.dumps({ESCAPE: [0, 1]}),
    "one end": '{"conv_in": [0]}',
    "text": '{"conv_in": ["a", "b"]}',
    "NaN": '{"conv_in": [NaN, 1]}',
    "infinity": '{"conv_in": [-Infinity, Infinity]}',
    "1e400": '{"conv_in": [0, 1e400]}',
    "backwards": '{"conv_in": [1, 0]}',
    "timesteps: 7": '{"timesteps": 7}',
    "timesteps of text": '{"timesteps": ["x"]}',
    "10**400": '{"conv_in": [0, 1' + "0" * 400 + "]}",
    "lists of other lengths": '{"conv_in": [[0, 0], [1]]}',
    "nested lists": '{"conv_in": [[[[0]]], 1]}',
    "one layer alone": '{"conv_in": [0, 1]}',
}
_FORMS: dict[str, str | bytes] = {
    **JSONS,
    "another target": '{"target": "evil", "entries": []}',
    "an entry that is a list": '{"target": "tensorrt-rtx", "entries": [[]]}',
    "a size of 10**400": '{"target": "tensorrt-rtx", "entries": [{"operator": '
    '"group-norm", "signature": {"elements": 1' + "0" * 400 + '}, "form": "x"}]}',
    "an unknown form": '{"target": "tensorrt-rtx", "entries": [{"operator": "group-norm", "signature": {}, '
    '"form": "evil"}]}',
}
_CLASS = """
class P:
    name = "mine"
    exact = True
    runs_after = ()

    def apply(self, model, context, report):
        {body}
"""
_MINE: dict[str, tuple[str, tuple[int, ...]]] = {
    "is no Python": ("def f(:", (5,)),
    "raises while it is read": ("1 / 0", (5,)),
    "exits with 0": ("raise SystemExit(0)", (5,)),
    "is empty": ("", (2,)),
    "holds NUL bytes": ("\0", (5,)),
    "has no such class": ("class Q: pass", (2,)),
    "is a function": ("def P(): pass", (2,)),
    "is a class without a name": ("class P: pass", (2,)),
    "divides by zero": (_CLASS.format(body="1 / 0"), (5,)),
    "exits": (_CLASS.format(body="raise SystemExit(0)"), (5,)),
    "calls itself for ever": (_CLASS.format(body="self.apply(model, context, report)"), (5,)),
    "raises a message that drives the terminal": (_CLASS.format(body="raise ValueError('\\x1b]0;owned\\x07')"), (5,)),
    "leaves a graph without outputs": (
        _CLASS.format(body="model.graph.outputs.clear(); report.touched.append('x')"),
        (3, 4, 5, 6),
    ),
    "has a name that is a number": (_CLASS.replace('"mine"', "7"), (2,)),
    "has the name of another": (_CLASS.replace('"mine"', '"fold-adapters"').format(body="pass"), (2,)),
}
_PROMPTS: dict[str, tuple[str | bytes, tuple[int, ...]]] = {
    "empty": ("", (2,)),
    "not UTF-8": (b"caf\xe9\n", (2,)),
    "random bytes": (bytes(range(256)), (2,)),
    "empty lines alone": ("\n\n\n", (2,)),
    "a prompt that drives the terminal": (f"{ESCAPE}\n", (0,)),
    "a prompt of 100,000 words": ("red " * 100_000 + "\n", (0,)),
    "NUL bytes": ("\0\0\0\n", (0,)),
    "a lone surrogate": ("\ud800\n", (2,)),
    "70 MB of prompts": ("x" * 70_000_000, (2,)),
}


def file_rows() -> Iterator[Row]:
    """Files that options and recipes name, every odd kind of file at every reader, and odd names."""
    for what, text in _BITS.items():
        yield _given("bit plan", what, "bits.yaml", text, (2,), lambda path: ["--set", f"bit_plan={path}"])
    for what, text in _RANGES.items():
        yield _given("ranges", what, "ranges.json", text, (3,), lambda path: ["--ranges", path])
    for what, data in SAFETENSORS.items():
        yield _given(
            "ranges", f"safetensors: {what}", "ranges.safetensors", data, (3,), lambda path: ["--ranges", path]
        )
    for what, (content, codes) in _PROMPTS.items():
        yield _given(
            "prompts",
            what,
            "prompts.txt",
            content,
            codes,
            lambda path: ["--set", f"calibration.prompts_file={path}"],
            "sd",
        )
    for what, text in _FORMS.items():
        codes = (0, 3) if what in {"another target", "an unknown form"} else (3,)
        yield _row("forms", what, _forms(text), codes)
    for what, (text, codes) in _MINE.items():
        yield Row(
            group="pass",
            what=what,
            make=_pass(text),
            codes=codes,
            keeps_log=codes == (5,),
            says=(text.partition('name = "')[2].partition('"')[0] or "--pass",) if codes in {(2,), (5,)} else (),
        )
    yield from _odd_kinds()
    yield from _odd_names()


def _row(group: str, what: str, make: Any, codes: tuple[int, ...], says: tuple[str, ...] = ()) -> Row:
    return Row(group=group, what=what, make=make, codes=codes, says=says)


def _given(  # noqa: PLR0913 - a row and how its file is named
    group: str,
    what: str,
    name: str,
    content: str | bytes,
    codes: tuple[int, ...],
    option: Callable[[Path], list[object]],
    seed: str = "nano",
) -> Row:
    def make(place: Place) -> list[object]:
        return place.quantize(getattr(place.seeds, seed), *option(place.write(name, content)))

    # what is wrong with a layer is found when the plan meets the model
    says = group if group == "bit plan" and "layer" in what else name
    return _row(group, what, make, codes, (says,) if codes != (0,) else ())


def _forms(text: str | bytes) -> Any:
    def make(place: Place) -> list[object]:
        path = place.write("forms.json", text)
        return [
            "compile",
            place.seeds.nano,
            "--recipe",
            place.recipe,
            "--target",
            "onnxruntime",
            "--forms",
            path,
            "--out",
            place.folder / "out",
        ]

    return make


def _pass(text: str) -> Any:
    def make(place: Place) -> list[object]:
        path = place.write("p.py", text)
        return [
            "compile",
            place.seeds.nano,
            "--recipe",
            place.recipe,
            "--target",
            "onnxruntime",
            "--pass",
            f"{path}:P",
            "--out",
            place.folder / "out",
        ]

    return make


# every reader: how a path reaches it, and the code of what it cannot read
_READERS: dict[str, tuple[Callable[[Place, Path], list[object]], str, tuple[int, ...]]] = {
    "recipe": (lambda _, path: ["recipes", path], "r.yaml", (2,)),
    "bit plan": (lambda place, path: place.quantize(place.seeds.nano, "--set", f"bit_plan={path}"), "b.yaml", (2,)),
    "prompts": (
        lambda place, path: place.quantize(place.seeds.sd, "--set", f"calibration.prompts_file={path}"),
        "p.txt",
        (2,),
    ),
    "ranges (JSON)": (lambda place, path: place.quantize(place.seeds.nano, "--ranges", path), "r.json", (2, 3)),
    "ranges (safetensors)": (
        lambda place, path: place.quantize(place.seeds.nano, "--ranges", path),
        "r.safetensors",
        (2, 3),
    ),
    "forms": (lambda place, path: place.quantize(place.seeds.nano, "--forms", path), "f.json", (2, 3)),
    "pass": (
        lambda place, path: ["compile", place.seeds.nano, "--pass", f"{path}:P", "--out", place.folder / "out"],
        "p.py",
        (2, 5),
    ),
    "ONNX file": (lambda _, path: ["inspect", path], "m.onnx", (3,)),
    "plan": (lambda _, path: ["inspect", path], "plan.json", (3, 10)),
    "plan with --gpu": (lambda _, path: ["inspect", path, "--gpu", "a100"], "plan.json", (3, 10)),
    "unet/config.json": (lambda place, _: place.quantize(place.folder / "nano"), "nano/unet/config.json", (3,)),
    "weights": (
        lambda place, _: place.quantize(place.folder / "nano"),
        "nano/unet/diffusion_pytorch_model.safetensors",
        (3,),
    ),
    "model_index.json": (lambda place, _: place.quantize(place.folder / "nano"), "nano/model_index.json", (3,)),
    "scheduler_config.json": (
        lambda place, _: place.quantize(place.folder / "nano"),
        "nano/scheduler/scheduler_config.json",
        (3,),
    ),
    "manifest.json": (lambda place, _: ["export", place.folder / "out"], "out/manifest.json", (3, 10)),
    "report.json": (lambda place, _: ["inspect", place.folder / "out"], "out/report.json", (3, 10)),
    "quantization.safetensors": (
        lambda place, _: ["export", place.folder / "out"],
        "out/checkpoint/quantization.safetensors",
        (3, 10),
    ),
    "model.onnx": (lambda place, _: ["validate", place.folder / "out"], "out/onnx/model.onnx", (3, 6, 8, 10)),
    "output folder": (
        lambda place, path: ["quantize", place.seeds.nano, "--recipe", place.recipe, "--out", path],
        "out-kind",
        (2, 10),
    ),
}
_KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nothing"),
    "a link to itself": lambda path: path.symlink_to(path),
}


def _odd_kinds() -> Iterator[Row]:
    for reader, (command, name, codes) in _READERS.items():
        for kind, create in _KINDS.items():
            if (reader, kind) in {("output folder", "a folder"), ("output folder", "a link to nothing")}:
                continue

            def make(place: Place, name: str = name, create: Any = create, command: Any = command) -> list[object]:
                path = place.folder / name
                if "/" in name:
                    place.copy(name.partition("/")[0])
                    path.unlink(missing_ok=True)
                create(path)
                return list(command(place, path))

            yield _row("kind of file", f"{reader}: {kind}", make, codes)


def _odd_names() -> Iterator[Row]:
    names = {
        "an escape": "a\x1b]0;owned\x07b",
        "a newline": "a\nError: none",
        "rich markup": "[red]a[/]",
        "a space": " a b ",
        "a direction": "a\u202egpj.exe",
        "a byte that is not UTF-8": os.fsdecode(b"caf\xe9"),
        "a leading dash": "./-a",
        "a percent sign": "%s%n{0}",
        "a quote": "a'b\"c",
        "200 letters": "a" * 200,
        "a tab": "a\tb",
        "an emoji code": ":smile:",
    }
    for what, name in names.items():
        stem = name.removeprefix("./")
        yield _row("name", f"{what}: a recipe that is wrong", _named(f"{stem}.yaml", "x", ["recipes"]), (2,))
        yield _row("name", f"{what}: an ONNX file", _named(f"{stem}.onnx", "x", ["inspect"]), (3, 10))
        yield _row("name", f"{what}: a plan", _named(f"{stem}.json", "x", ["inspect"]), (3, 10))
        yield _row("name", f"{what}: a model folder", _model_named(stem), (0, 3) if "UTF-8" in what else (0,))
        yield _row("name", f"{what}: a bit plan", _bits_named(f"{stem}.yaml"), (2,))

        def out(place: Place, stem: str = stem) -> list[object]:
            return ["quantize", place.seeds.nano, "--recipe", place.recipe, "--out", place.folder / "out" / stem]

        yield _row("name", f"{what}: an output folder", out, (0, 10))


def _named(name: str, content: str, command: list[object]) -> Any:
    return lambda place: [*command, place.write(name, content)]


def _model_named(name: str) -> Any:
    def make(place: Place) -> list[object]:
        return place.quantize(place.copy("nano").rename(place.folder / name))

    return make


def _bits_named(name: str) -> Any:
    def make(place: Place) -> list[object]:
        return place.quantize(place.seeds.nano, "--set", f"bit_plan={json.dumps(str(place.write(name, '[')))}")

    return make
