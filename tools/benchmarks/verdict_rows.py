"""The recipes whose verdicts are measured, from 8 bits to 2, and what is known of them on `shapes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from benchmarks.quality_rows import recipe_named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qdexport.core.recipe import Recipe

__all__ = ["ROWS", "VerdictRow"]

_ALL_W: Final = "rules.0.weight.bits"
_ALL_A: Final = "rules.0.activation.bits"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRow:
    """One recipe.

    Attributes:
        name: for files, options and tables.
        source: a preset, or `naive` or `mse-ranges` of the quality table.
        changes: what is set, by dotted keys.
        kept: whether its pictures of `shapes` must be kept.
    """

    name: str
    source: str
    kept: bool
    changes: tuple[tuple[str, Any], ...] = ()

    def recipe(self, sources: Mapping[str, dict[str, Any]]) -> Recipe:
        """The recipe; no text encoder and no VAE is compiled beside the denoiser."""
        return recipe_named(self.source, sources, {**dict(self.changes), "companions.networks": "none"})


def _bits(weight: int, activation: int) -> tuple[tuple[str, Any], ...]:
    return ((_ALL_W, weight), (_ALL_A, activation))


ROWS: Final = (
    VerdictRow(name="w8a8", source="w8a8", kept=True),
    VerdictRow(name="w8a8-asym", source="w8a8-asym", kept=True),
    VerdictRow(name="mixdq-w8a8", source="mixdq-w8a8", kept=True),
    VerdictRow(name="w6a6", source="w6a6", kept=True),
    VerdictRow(name="w4a8", source="w4a8", kept=True),
    VerdictRow(name="emf-w4a8-init", source="emf-w4a8-init", kept=True),
    VerdictRow(name="tcaq-w4a4-init", source="tcaq-w4a4-init", kept=True),
    VerdictRow(name="mse-w4a4", source="mse-ranges", kept=False, changes=_bits(4, 4)),
    VerdictRow(
        name="naive-w4a4-rows", source="naive", kept=False, changes=(*_bits(4, 4), ("activation_rows", "per_step"))
    ),
    VerdictRow(name="naive-w4a4", source="naive", kept=False, changes=_bits(4, 4)),
    VerdictRow(name="mse-w2a8", source="mse-ranges", kept=False, changes=_bits(2, 8)),
    VerdictRow(name="mse-w2a4", source="mse-ranges", kept=False, changes=_bits(2, 4)),
)
