"""Hostile artefacts: what qdexport itself writes, damaged or from elsewhere, and ONNX files of others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from reliability.hostile_models import ESCAPE, JSONS, SAFETENSORS
from reliability.hostile_run import Place, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["artefact_rows"]

_REPORT = {"tool_version": "x", "model": "m", "recipe": "r", "target": "tensorrt-rtx"}
_KERNEL = {"index": 0, "name": "k", "kind": "gemm", "inputs": ["int8[4,4] x"], "outputs": ["int8[4,4] y"]}
_VERBS = {"export": (3, 5, 6), "validate": (3, 8), "sample": (3,), "inspect": (3,)}
# of a manifest: hostile values by path
_MANIFEST: dict[str, Any] = {
    "an artifact upwards": {"kind": "onnx", "path": "../../evil", "sha256": "x", "stage": "export"},
    "an artifact with a root": {"kind": "onnx", "path": "/etc/passwd", "sha256": "x", "stage": "export"},
    "an artifact that is a dot": {"kind": "checkpoint", "path": ".", "sha256": "x", "stage": "quantize"},
    "an artifact of an unknown kind": {"kind": "evil", "path": "x", "sha256": "x", "stage": "export"},
    "an artifact with a NUL": {"kind": "onnx", "path": "a\0b", "sha256": "x", "stage": "export"},
    "an artifact with an escape": {"kind": "onnx", "path": ESCAPE, "sha256": "x", "stage": ESCAPE},
    "an artifact that is a number": 7,
}
_PLANS: dict[str, Any] = {
    "no kernels": {"target": "tensorrt-rtx", "kernels": []},
    "kernels: 7": {"target": "tensorrt-rtx", "kernels": 7},
    "a kernel that is a list": {"target": "tensorrt-rtx", "kernels": [[]]},
    "an unknown target": {"target": ESCAPE, "kernels": [_KERNEL]},
    "a tensor that is no tensor": {
        "target": "tensorrt-rtx",
        "kernels": [{**_KERNEL, "inputs": [ESCAPE, "", "int8["]}],
    },
    "a tensor of 10**300 values": {
        "target": "tensorrt-rtx",
        "kernels": [{**_KERNEL, "inputs": ["int8[1" + "0" * 300 + "] x"]}],
    },
    "a tensor with a number of 5000 digits": {
        "target": "tensorrt-rtx",
        "kernels": [{**_KERNEL, "inputs": ["int8[" + "9" * 5000 + "] x"]}],
    },
    "a negative tensor": {
        "target": "tensorrt-rtx",
        "kernels": [{**_KERNEL, "inputs": ["int8[-4,4] x", "const int8[0] w"]}],
    },
    "names that drive the terminal": {
        "target": "tensorrt-rtx",
        "kernels": [{**_KERNEL, "name": ESCAPE, "modules": [ESCAPE]}],
    },
    "names of rich markup": {
        "target": "tensorrt-rtx",
        "kernels": [{**_KERNEL, "name": "[red]x[/] [/]", "kind": "[/]"}],
    },
    "a profile of -10**20": {"target": "tensorrt-rtx", "kernels": [{**_KERNEL, "profile": -(10**20)}]},
    "200,000 kernels": {"target": "tensorrt-rtx", "kernels": [_KERNEL] * 200_000},
    "no target": {"kernels": []},
}


def artefact_rows() -> Iterator[Row]:
    """Every file of an output folder, and ONNX files of others."""
    for what, text in JSONS.items():
        for file in ("manifest.json", "report.json", "onnx/passes.json"):
            yield from _of_folder(file, what, text)
        yield _inspected("plan.json", what, "plan.json", text)
    for what, artifact in _MANIFEST.items():
        for verb in ("inspect", "export", "quantize"):
            yield _row("manifest.json", f"{what} ({verb})", _with_artifact(artifact, verb), (0, 2, 3, 10))
    for what, plan in _PLANS.items():
        text, codes = json.dumps(plan), (0, 3, 7, 10)
        yield _inspected("plan.json", what, "plan.json", text, codes)
        yield _inspected("plan.json", f"{what}, with --gpu", "plan.json", text, codes, "--gpu", "rtx-4090")
    yield from _reports()
    yield from _binaries()
    yield from _golden()
    for what, text in (
        ("empty", ""),
        ("no YAML", "["),
        ("other rules", "name: r\nrules: [{match: nothing, weight: {bits: 8}}]\n"),
        ("a billion laughs", "a: &a [x]\nb: *a\n" * 3),
    ):
        file = "checkpoint/recipe.yaml"
        yield _row(file, what, _damaged(file, text.encode(), "export"), (2, 3, 10))
    for what, make in _onnx_files().items():
        yield _row("ONNX file", what, make, (0, 3))


def _binaries() -> Iterator[Row]:
    """Weights, codes and graphs."""
    file = "quantization.safetensors"
    for what, data in SAFETENSORS.items():
        for verb in ("inspect", "export"):
            yield _row(file, f"{what} ({verb})", _damaged(f"checkpoint/{file}", data, verb), (3, 10))
    contents: dict[str, bytes | None] = {
        "empty": b"",
        "random bytes": bytes(range(256)),
        "cut short": None,
        "a zip file": b"PK\x05\x06" + b"\0" * 18,
    }
    for what, content in contents.items():
        for verb in ("validate", "sample", "build", "inspect"):
            codes = (3, 10) if verb == "inspect" else (3, 6, 7, 8, 9, 10)
            yield _row("onnx/model.onnx", f"{what} ({verb})", _damaged("onnx/model.onnx", content, verb), codes)


def _row(group: str, what: str, make: Any, codes: tuple[int, ...], says: tuple[str, ...] = ()) -> Row:
    return Row(group=group, what=what, make=make, codes=codes, says=says)


def _command(place: Place, verb: str, path: object) -> list[object]:
    if verb == "sample":
        return ["sample", path, "--with", "onnx", "--count", "1", "--out", place.folder / "pictures"]
    if verb == "quantize":
        return ["quantize", place.seeds.nano, "--recipe", place.recipe, "--target", "onnxruntime", "--out", path]
    return [verb, path]


def _damaged(file: str, content: bytes | None, verb: str) -> Any:
    """A command on an output folder with one file replaced, or cut to its half."""

    def make(place: Place) -> list[object]:
        out = place.copy("out")
        path = out / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
        if verb == "inspect" and file.startswith(("onnx/", "checkpoint/")):
            # alone: there is no manifest beside it that knows how it was
            alone = path.parent.rename(place.folder / "alone")
            return ["inspect", alone / path.name if file.endswith(".onnx") else alone]
        return _command(place, verb, out)

    return make


def _of_folder(file: str, what: str, text: str | bytes) -> Iterator[Row]:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if file == "onnx/passes.json":
        yield _row(file, what, _explained(data), (3, 10))
        return
    for verb in ("inspect", "export", "quantize"):
        yield _row(file, f"{what} ({verb})", _damaged(file, data, verb), (0, 3, 10))


def _explained(data: bytes) -> Any:
    def make(place: Place) -> list[object]:
        out = place.copy("out")
        (out / "onnx").mkdir(exist_ok=True)
        (out / "onnx" / "passes.json").write_bytes(data)
        return ["inspect", out, "--explain", "conv_in"]

    return make


def _inspected(
    group: str, what: str, name: str, text: str | bytes, codes: tuple[int, ...] = (3, 10), *more: str
) -> Row:
    return _row(group, what, lambda place: ["inspect", place.write(name, text), *more], codes)


def _with_artifact(artifact: Any, verb: str) -> Any:
    def make(place: Place) -> list[object]:
        out = place.copy("out")
        facts = json.loads((out / "manifest.json").read_text())
        facts["artifacts"].append(artifact)
        (out / "manifest.json").write_text(json.dumps(facts))
        place.write("evil", "mine")
        return _command(place, verb, out)

    return make


def _reports() -> Iterator[Row]:
    values: dict[str, Any] = {
        "names that drive the terminal": {**_REPORT, "model": ESCAPE, "notes": [ESCAPE], "recipe": ESCAPE},
        "names of rich markup": {
            **_REPORT,
            "model": "[red]x[/] [/]",
            "notes": ["[/]", "[link=https://example.org]x[/link]"],
        },
        "notes: 7": {**_REPORT, "notes": 7},
        "an unknown key": {**_REPORT, ESCAPE: 7},
        "a stage that took NaN": {**_REPORT, "stages": {"x": {"seconds": "NaN", "peak_rss_mb": 1, "cached": False}}},
        "a stage that took 1e308 s": {
            **_REPORT,
            "stages": {"x": {"seconds": 1e308, "peak_rss_mb": 1, "cached": False}},
        },
        "no layers": {**_REPORT, "coverage": {"planned": {}, "onnx": {}}},
        "100,000 notes": {**_REPORT, "notes": ["x"] * 3000},
    }
    for what, value in values.items():
        for more in ((), ("--json",)):

            def make(place: Place, value: Any = value, more: tuple[str, ...] = more) -> list[object]:
                out = place.copy("out")
                (out / "report.json").write_text(json.dumps(value))
                return ["inspect", out, *more]

            yield _row("report.json", f"{what}{' (--json)' if more else ''}", make, (0, 3, 10))


def _golden() -> Iterator[Row]:
    from reliability.hostile_models import PICKLES, zipped

    files = {
        "empty": b"",
        "random bytes": bytes(range(256)),
        "a zip file of others": zipped({"a": b"1"}),
        "a pickle": PICKLES["a pickle that runs a command"](),
        "an object array": _object_array(),
    }
    for what, data in files.items():

        def make(place: Place, data: bytes = data) -> list[object]:
            out = place.copy("out")
            for file in (out / "golden").iterdir():
                file.write_bytes(data)
            return ["validate", out]

        yield _row("golden", what, make, (0, 3, 8, 10))


def _object_array() -> bytes:
    import io

    import numpy as np

    from reliability.hostile_models import Evil

    stream = io.BytesIO()
    np.savez(stream, np.array([Evil()], dtype=object))
    return stream.getvalue()


def _onnx_files() -> dict[str, Any]:
    import onnx
    from onnx import TensorProto, helper

    value, node = helper.make_tensor_value_info, helper.make_node

    def model(nodes: list[Any], tensors: Any = (), metadata: dict[str, str] | None = None, opset: int = 20) -> bytes:
        graph = helper.make_graph(nodes, "g", [value("x", 1, (1, 4))], [value("y", 1, None)], list(tensors))
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        for key, text in (metadata or {}).items():
            made.metadata_props.add(key=key, value=text)
        return bytes(made.SerializeToString())

    def external(location: str, offset: str = "0", length: str = "64") -> TensorProto:
        tensor = TensorProto(name="w", data_type=1, dims=(4, 4), data_location=TensorProto.EXTERNAL)
        for key, text in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=text)
        return tensor

    def nested(levels: int) -> bytes:
        """A graph in a branch of a graph, and so on."""
        inner = helper.make_graph([node("Relu", ["x"], ["y"])], "g", [], [value("y", 1, None)])
        for _ in range(levels):
            branch = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH)
            branch.g.CopyFrom(inner)
            step = node("If", ["x"], ["y"])
            step.attribute.append(branch)
            inner = helper.make_graph([step], "g", [], [value("y", 1, None)])
        return bytes(helper.make_model(inner).SerializeToString())

    product = [node("MatMul", ["x", "w"], ["y"], name="layer/MatMul")]
    relu = [node("Relu", ["x"], ["y"])]
    casts = [node("Cast", [f"c{i}"], [f"c{i + 1}"], to=1) for i in range(20_000)]
    files: dict[str, bytes] = {
        "weights that were not copied along": model(product, [external("model.onnx.data")]),
        "weights in ../../etc/passwd": model(product, [external("../../../../../../etc/passwd")]),
        "weights in /etc/passwd": model(product, [external("/etc/passwd")]),
        "weights in a pipe": model(product, [external("pipe")]),
        "an offset that is no number": model(product, [external("small.bin", offset="x")]),
        "an offset of -1": model(product, [external("small.bin", offset="-1")]),
        "a length of 10**18": model(product, [external("small.bin", length="1" + "0" * 18)]),
        "a circle of Cast before a product": model(
            [node("Cast", ["b"], ["a"], to=1), node("Cast", ["a"], ["b"], to=1), node("MatMul", ["x", "a"], ["y"])]
        ),
        "a node that reads itself": model([node("Relu", ["y"], ["y"])]),
        "20,000 Cast before a product": model([*casts, node("MatMul", ["x", "c20000"], ["y"])]),
        "a MatMul of one input": model([node("MatMul", ["x"], ["y"])]),
        "a MatMul of no input": model([node("MatMul", [], ["y"])]),
        "a Conv of one input": model([node("Conv", ["x"], ["y"])]),
        "a product whose weight has no name": model([node("MatMul", ["x", ""], ["y"])]),
        "data shorter than its shape": model(
            product, [TensorProto(name="w", data_type=1, dims=(1000, 1000), raw_data=b"1234")]
        ),
        "an unknown element type": model(product, [TensorProto(name="w", data_type=99, dims=(1,), raw_data=b"1234")]),
        "a negative shape": model(product, [TensorProto(name="w", data_type=1, dims=(-1, 4), raw_data=b"1234")]),
        "a shape of 10**18": model(product, [TensorProto(name="w", data_type=1, dims=(10**9, 10**9), raw_data=b"")]),
        "two nodes make one value": model(relu * 2),
        "no nodes": model([]),
        "no opset": bytes(
            helper.make_model(helper.make_graph(relu, "g", [], []), opset_imports=[]).SerializeToString()
        ),
        "opset 10**9": model(relu, opset=10**9),
        "an unknown operator": model([node(ESCAPE, ["x"], ["y"], name=ESCAPE, domain=ESCAPE)]),
        "names that drive the terminal": model(
            [node("MatMul", ["x", "w"], ["y"], name=ESCAPE)],
            [TensorProto(name="w", data_type=1, dims=(4, 4), raw_data=b"\0" * 64)],
        ),
        "names of rich markup": model(
            [node("MatMul", ["x", "w"], ["y"], name="[red][/] [/]")],
            [TensorProto(name="w", data_type=1, dims=(4, 4), raw_data=b"\0" * 64)],
        ),
        "metadata of another version": model(relu, metadata={"qdexport": "{}"}),
        "metadata that is no JSON": model(relu, metadata={"qdexport": "{"}),
        "metadata nested 100,000 levels": model(relu, metadata={"qdexport": "[" * 100_000}),
        "metadata of a companion that is none": model(
            relu, metadata={"qdexport-companion": "[]", "qdexport_companion": "{}"}
        ),
        "20 graphs in each other": nested(20),
        "empty": b"",
        "random bytes": bytes(range(256)) * 10,
        "cut short": model(relu)[:-10],
        "text": b"hello\n",
        "5 MB of zeros": b"\0" * 5_000_000,
    }

    def maker(data: bytes) -> Callable[[Place], list[object]]:
        def make(place: Place) -> list[object]:
            import os

            place.write("small.bin", b"1234")
            os.mkfifo(place.folder / "pipe")
            return ["inspect", place.write("m.onnx", data)]

        return make

    return {what: maker(data) for what, data in files.items()}
