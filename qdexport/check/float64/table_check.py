"""What the comparison of a file's tables found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from qdexport.check.float64.alone import Pairing

__all__ = ["TableCheck"]

_SHOWN: Final = 3


@dataclass(slots=True)
class TableCheck:
    """What was compared.

    Attributes:
        rows: rows of tables, timesteps of lookups, classes, positions and constants, by kind.
        problems: sentences, one for each table that has a wrong row.
        notes: what could not be compared row by row, in sentences.
        pairings: for each condition, which values of the file are what PyTorch makes of it.
    """

    rows: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pairings: list[Pairing] = field(default_factory=list)

    def pairing(self, names: frozenset[str]) -> Pairing | None:
        """That of a condition."""
        return next((item for item in self.pairings if item.condition.names == names), None)

    def wrong(self, what: str, places: Sequence[str]) -> None:
        """Adds a sentence, if there are any places."""
        if places:
            shown = "; ".join(places[:_SHOWN])
            more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
            self.problems.append(f"{what}: {shown}{more}")
