"""What every compiler pass did, kept beside the ONNX file, and what that means for one layer."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qdexport.core.files import write_json
from qdexport.core.reading import read_record
from qdexport.errors import ModelError, RecipeError

__all__ = ["PASS_LOG_FILE", "Explained", "PassFacts", "PassLog"]

PASS_LOG_FILE = "passes.json"  # noqa: S105  no password


class PassFacts(BaseModel):
    """What one pass did.

    Attributes:
        name: of the pass.
        exact: whether it keeps all numbers.
        nodes_before: nodes of the graph before it.
        nodes_after: nodes of the graph after it.
        touched: torch modules whose nodes it changed.
        notes: what became of a torch module, where it has more than one way.
        skipped: nodes where it did not apply, with the reason.
        chosen: the form that an operator of a torch module got, with the costs of the others.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    exact: bool
    nodes_before: int
    nodes_after: int
    touched: list[str] = Field(default_factory=list)
    notes: dict[str, str] = Field(default_factory=dict)
    skipped: list[tuple[str, str]] = Field(default_factory=list)
    chosen: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """What one pass did to one layer.

    Attributes:
        name: of the pass.
        what: ``changed`` the layer or a quantizer of it, changed something ``around`` it, ``skipped`` it for a reason,
            or had ``nothing`` to do there.
        details: modules, notes and reasons.
    """

    name: str
    what: Literal["changed", "around", "skipped", "nothing"]
    details: tuple[str, ...]


class PassLog(BaseModel):
    """All passes of one export, in order."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    passes: list[PassFacts]

    def save(self, path: Path) -> None:
        """Writes atomically."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> PassLog:
        """Reads a log. Raises ``ModelError`` when the file is absent or not one of ours."""
        return read_record(cls, path, ModelError, "`qdexport export` writes it")

    def explain(self, layer: str, known: list[str] | None = None) -> list[Explained]:
        """What every pass did to a layer.

        Args:
            layer: torch module path.
            known: all layers; a layer that is none of them and that no pass names is refused.

        Raises:
            RecipeError: there is no such layer; the message names the nearest.
        """
        found = [_explained(facts, layer) for facts in self.passes]
        if layer not in (known or []) and all(item.what in {"nothing", "around"} for item in found):
            names = known or sorted({_layer_of(name) for facts in self.passes for name in facts.touched})
            near = difflib.get_close_matches(layer, names, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise RecipeError(f"no layer {layer!r} in this network{hint}")
        return found


def _explained(facts: PassFacts, layer: str) -> Explained:
    own = [name for name in facts.touched if _within(name, layer)]
    notes = [f"{name}: {note}" for name, note in facts.notes.items() if _within(name, layer)]
    chosen = [f"{name}: {why}" for name, why in facts.chosen.items() if _within(name, layer)]
    reasons = [f"{node}: {reason}" for node, reason in facts.skipped if _within(node.rpartition("/")[0], layer)]
    if own or notes:
        return Explained(name=facts.name, what="changed", details=(*dict.fromkeys(own), *notes, *chosen, *reasons))
    if reasons or chosen:
        return Explained(name=facts.name, what="skipped", details=(*chosen, *reasons))
    around = [name for name in facts.touched if name and layer.startswith(f"{name}.")]
    if around:
        return Explained(name=facts.name, what="around", details=tuple(dict.fromkeys(around)))
    return Explained(name=facts.name, what="nothing", details=())


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith((f"{layer}.", f"{layer}#"))


def _layer_of(name: str) -> str:
    return name.split(".input_quantizer")[0].removesuffix(".weight_quantizer")
