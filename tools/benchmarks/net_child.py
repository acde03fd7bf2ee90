"""Runs one row of the net in this process, and writes what came of it: texts that can be compared line by line.

Nothing of the package is imported but its command line and what makes the small models, so that a change inside the
package changes nothing here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.net_rows import Row

__all__ = ["NUMBERS", "STRUCTURE", "run_row"]

# the same on every processor, for the same versions of libraries
STRUCTURE: Final = "structure.txt"
# these depend on the order in which a processor adds up
NUMBERS: Final = "numbers.txt"
_COVERED: Final = frozenset({"planned", "onnx", "engine", "storage", "bits", "scale_rows"})
_UNSTEADY: Final = frozenset(
    {"seconds", "build_seconds", "peak_rss_mb", "bytes_per_second", "builder_version", "tool_version", "cached"}
)


def run_row(row: Row, models: Path, folder: Path) -> int:
    """Runs a row's command; returns its exit code.

    Args:
        row: the command.
        models: where the small models and the recipes are, or are made.
        folder: gets ``structure.txt`` and ``numbers.txt``, whole or not at all.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        places = {"OUT": str(out)}
        if row.family:
            places["MODEL"] = _model(models, row.family)
            places["PRESET"] = _preset(models, row.preset, Path(scratch))
        code, said = 0, ""
        for command in row.commands:
            if code == 0:
                code, said = _run([_filled(item, places) for item in command], Path(scratch))
        named = {scratch: "SCRATCH", str(models): "MODELS", str(Path.cwd()): "HERE"}
        structure = [f"exit code {code}", *_told(said, named, brief=bool(row.family) and code in {0, 8})]
        numbers: list[str] = []
        if row.family and code in {0, 8}:
            structure += _structure(out)
            numbers += _numbers(out)
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, lines in ((STRUCTURE, structure), (NUMBERS, numbers)):
        (partial / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return code


def _filled(item: str, places: dict[str, str]) -> str:
    head, slash, tail = item.partition("/")
    return places.get(head, head) + slash + tail


def _model(models: Path, family: str) -> str:
    from qdexport.models.tiny import TinyOptions, save_tiny_pipeline

    if family == "shapes":
        return family
    folder = models / family
    if not folder.is_dir():
        scheduler = "LCMScheduler" if family == "lcm" else "DDIMScheduler"
        options = TinyOptions(scheduler=scheduler, text_encoders=family in {"pixart", "sd3", "flux"})
        with tempfile.TemporaryDirectory(dir=models) as made:
            known: Any = family
            save_tiny_pipeline(Path(made) / family, known, options)
            Path(made, family).rename(folder)
    return str(folder)


def _preset(models: Path, preset: str, scratch: Path) -> str:
    """A preset; of one that searches for widths, a file with widths that are given."""
    _, said = _run(["recipes", preset, "--json"], scratch)
    recipe = json.loads(said)
    if not recipe.get("bit_allocation"):
        return preset
    narrow = {**recipe["rules"][0], "match": "re:.*(to_[qk]|ff\\.net\\.2|conv1)$"}
    narrow["weight"] = {**narrow["weight"], "bits": 4}
    path = models / f"{preset}.yaml"
    text = json.dumps({**recipe, "bit_allocation": None, "rules": [*recipe["rules"], narrow]}, indent=1)
    partial = scratch / path.name
    partial.write_text(text, encoding="utf-8")
    shutil.move(partial, path)
    return str(path)


def _run(arguments: list[str], scratch: Path) -> tuple[int, str]:
    """Exit code, and all that was written to both streams."""
    from qdexport.cli.main import main

    log = scratch / "said.txt"
    kept = [os.dup(1), os.dup(2)]
    argv, sys.argv = sys.argv, ["qdexport", *arguments]
    try:
        with log.open("wb") as stream:
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
            code: Any = 0
            try:
                main()
            except SystemExit as ending:
                code = ending.code
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        sys.argv = argv
        for number, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, number)
            os.close(saved)
    return int(code or 0), log.read_text(encoding="utf-8", errors="replace")


def _told(said: str, named: dict[str, str], *, brief: bool) -> list[str]:
    """What was said, with paths replaced; of a run that went through, nothing: its report says it."""
    if brief:
        return []
    for path, name in named.items():
        said = said.replace(path, name)
    lines = [re.sub(r"after \d[\d.]* s$", "after N s", line.rstrip()) for line in said.splitlines()]
    return [line for line in lines if not line.endswith(" left")]


def _structure(out: Path) -> Iterator[str]:
    for path in sorted(out.rglob("*.onnx")):
        yield f"== {path.relative_to(out)}"
        yield from _graph_lines(path)
    for path in sorted(out.rglob("passes.json")):
        yield f"== {path.relative_to(out)}"
        yield from _json_lines(path)
    for path in sorted(out.rglob("plan.json")):
        yield f"== {path.relative_to(out)}"
        for kernel in json.loads(path.read_bytes())["kernels"]:
            yield _signature(kernel)
    report = json.loads((out / "report.json").read_bytes())
    yield "== report.json: verdict and coverage"
    yield str((report.get("verdict") or {}).get("compiled"))
    kept = {key: value for key, value in (report.get("coverage") or {}).items() if key in _COVERED}
    yield from json.dumps(kept, indent=1, sort_keys=True).splitlines()


def _numbers(out: Path) -> Iterator[str]:
    for path in sorted([*out.rglob("*.onnx"), *out.rglob("*.onnx.data"), *out.rglob("quantization.safetensors")]):
        yield f"{path.relative_to(out)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    yield "== report.json"
    yield from _json_lines(out / "report.json")


def _graph_lines(path: Path) -> Iterator[str]:
    """Every tensor and node of a file: names, types and shapes, and no value."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    yield f"opset {[(item.domain, item.version) for item in model.opset_import]}"
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        yield f"{value.name} {kind.elem_type} {[item.dim_param or item.dim_value for item in kind.shape.dim]}"
    for tensor in model.graph.initializer:
        yield f"{tensor.name} {tensor.data_type} {list(tensor.dims)}"
    for node in model.graph.node:
        attributes = [_attribute(item) for item in sorted(node.attribute, key=lambda item: item.name)]
        yield f"{node.domain}:{node.op_type} {list(node.input)} -> {list(node.output)} {attributes}"


def _attribute(item: Any) -> str:
    import onnx

    if item.type == onnx.AttributeProto.TENSOR:
        return f"{item.name}={item.t.data_type}{list(item.t.dims)}"
    value = onnx.helper.get_attribute_value(item)
    return f"{item.name}={value if not isinstance(value, float) else 'float'}"


def _json_lines(path: Path) -> list[str]:
    return json.dumps(_steady(json.loads(path.read_bytes())), indent=1, sort_keys=True).splitlines()


def _steady(value: Any) -> Any:
    """The same without what differs from run to run."""
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in _UNSTEADY}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def _signature(kernel: dict[str, Any]) -> str:
    """A kernel without the numbers by which the builder tells names apart."""
    return re.sub(r"\d{3,}", "N", json.dumps({key: kernel[key] for key in sorted(kernel) if key != "index"}))
