"""What a sensitivity sweep found: one number per layer and width, for weights and for activations."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qdexport.core.files import write_json
from qdexport.core.reading import read_record
from qdexport.errors import ModelError

__all__ = ["METRIC_OF_GROUP", "Group", "LayerSensitivity", "Metric", "Part", "SensitivityTable"]

Part = Literal["weight", "activation"]
Group = Literal["content", "quality"]
Metric = Literal["ssim", "sqnr_db"]

METRIC_OF_GROUP: dict[Group, Metric] = {"content": "ssim", "quality": "sqnr_db"}


class LayerSensitivity(BaseModel):
    """One measurement: everything in floating point but one layer's weight, or one activation.

    Attributes:
        part: what was quantized.
        name: the layer, or the group of layers that read one tensor through one quantizer.
        layers: torch module paths of the layers.
        group: content layers are judged by images, quality layers by the denoiser's output.
        metric: mean SSIM to the floating-point images, or SQNR of the denoiser's output in dB; larger is better.
        values: the metric by width.
        seconds: how long it took, for all widths.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: Part
    name: str
    layers: tuple[str, ...]
    group: Group
    metric: Metric
    values: dict[int, float]
    seconds: float = 0.0

    def at(self, bits: int) -> float:
        """The metric at a width.

        Raises:
            ModelError: it was not measured; no other width's number stands in for it.
        """
        if bits not in self.values:
            measured = ", ".join(map(str, sorted(self.values)))
            raise ModelError(
                f"the sensitivity of {self.name} ({self.part}) was not measured at {bits} bits, only at {measured}; "
                "add the width to bit_allocation in the recipe and run the sweep again"
            )
        return self.values[bits]


class SensitivityTable(BaseModel):
    """All measurements of a sweep.

    Attributes:
        model: the model's name.
        recipe: the recipe's name.
        entries: in the order of the model's layers, weights first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str
    recipe: str
    entries: tuple[LayerSensitivity, ...]

    def of(self, part: Part, group: Group | None = None) -> list[LayerSensitivity]:
        """The measurements of weights or activations, of all layers or of one group."""
        return [entry for entry in self.entries if entry.part == part and group in (None, entry.group)]

    def of_layer(self, part: Part, layer: str) -> LayerSensitivity:
        """The measurement that a layer belongs to. Raises ``ModelError`` when there is none."""
        for entry in self.entries:
            if entry.part == part and layer in entry.layers:
                return entry
        raise ModelError(f"the sweep has no {part} sensitivity of layer {layer}; run it again")

    def save(self, path: Path) -> None:
        """Writes JSON atomically."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> SensitivityTable:
        """Reads what :meth:`save` wrote. Raises ``ModelError`` when the file is absent or not one of ours."""
        return read_record(cls, path, ModelError, "run the sweep first")
