"""Exports one text encoder or VAE decoder, measured: ``python -m benchmarks.companion_child SPEC.json``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.children import answer
from benchmarks.costs import Cost, measured
from qdexport.errors import QdExportError

__all__ = ["main"]


def main(spec_path: str) -> None:
    """Writes ``<folder>/model.onnx`` and answers with costs and facts.

    The specification holds ``model``, ``shapes`` (as JSON), ``target``, ``parity`` and ``folder``.
    """
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    costs: dict[str, Cost] = {}
    with measured(costs, "import"):
        import torch

        from qdexport.core.recipe import Shapes
        from qdexport.core.target import target_named
        from qdexport.models.companions import example_companion_inputs
        from qdexport.models.synthetic_companions import random_companion
        from qdexport.pipeline.companions import lower_companion
    shapes, folder = Shapes.model_validate(spec["shapes"]), Path(spec["folder"])
    with measured(costs, "load"):
        companion = random_companion(spec["model"], spec["target"], shapes)
    facts, parameters = companion.facts, sum(item.numel() for item in companion.network.parameters())
    with measured(costs, "export"):
        file = lower_companion(companion, folder, target_named(spec["target"]))
    parity = None
    if spec["parity"]:
        from qdexport.check.companions import OnnxCompanion, companion_parity

        with measured(costs, "parity"), torch.no_grad():
            calls = [example_companion_inputs(companion, seed=1)]
            found = companion_parity(companion, OnnxCompanion(file.path, facts), calls, most=1)
            parity = found.model_dump(mode="json")
    result = {
        "network": facts.network,
        "class_name": facts.class_name,
        "body": facts.body,
        "parameters": parameters,
        "io": facts.io.model_dump(mode="json"),
        "nodes": file.nodes,
        "onnx_bytes": file.bytes,
        "parity": parity,
        "costs": {name: asdict(cost) for name, cost in costs.items()},
    }
    answer(spec, result)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except QdExportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
