"""Which form an operator is written in, by its shape: a table of what was measured, kept as data.

A builder fuses one way of writing an operator and not another, and which one depends on sizes, on what follows, and on
the builder's version. So the passes that can write an operator in several forms ask this table, and a search fills it
(:mod:`qdexport.search`). No size is a constant in code.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from math import log2
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qdexport.core.files import write_text
from qdexport.core.reading import read_record
from qdexport.errors import ModelError

__all__ = ["Choice", "FormEntry", "FormTable", "FormTrial", "Signature", "shipped_forms"]

# categories (text) and sizes (whole numbers) of one operator, the size that matters most first
Signature = dict[str, str | int]

_FOLDER = "assets/forms"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FormTrial(_Record):
    """What a block of the network costs with an operator in one form.

    Attributes:
        form: name of the form.
        kernels: of the block's plan; None when the builder refused it.
        moved_bytes: read and written by these kernels, weights included.
        microseconds: roofline time on the entry's GPU, a bound.
        why_not: the form was not allowed to win: the builder refused it, or it changes numbers.
    """

    form: str
    kernels: int | None = None
    moved_bytes: int | None = None
    microseconds: float | None = None
    why_not: str = ""

    def __str__(self) -> str:
        if self.why_not or self.kernels is None or self.moved_bytes is None or self.microseconds is None:
            return f"{self.form}: {self.why_not or 'not built'}"
        moved = f"{self.moved_bytes / 1e6:.2f} MB, {self.microseconds:.1f} us"
        return f"{self.form}: {self.kernels} kernels, {moved}"


class FormEntry(_Record):
    """The form that won for one operator of one shape, with every form that was tried.

    Attributes:
        operator: kind of operator, as the pass that writes it names it.
        signature: its categories and sizes.
        form: the one that won.
        builder: version of the builder that judged.
        gpu: key of the table of GPUs whose rates the times are of.
        block: digest of the block that was built; another block may have judged the same signature before.
        tried: costs of the same block in every form.
    """

    operator: str
    signature: Signature
    form: str
    builder: str = ""
    gpu: str = ""
    block: str = ""
    tried: tuple[FormTrial, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A form, and a sentence that says where it comes from, with the numbers of the alternatives."""

    form: str
    why: str


class FormTable(_Record):
    """All entries of one target; of two with equal operator and signature the first counts."""

    schema_version: Literal[1] = 1
    target: str
    entries: tuple[FormEntry, ...] = Field(default=())

    def choose(self, operator: str, signature: Signature, default: str) -> Choice:
        """The form for an operator: that of its signature, else of the nearest one that was measured.

        The nearest entry has the fewest categories that differ, then the least ``|log2 ratio|`` of the first size, then
        the least sum over all sizes, then the first place in the table.

        Args:
            operator: kind of operator.
            signature: its categories and sizes; a table entry without one of them does not differ in it.
            default: for a target of which nothing is known about this operator.
        """
        entries = [entry for entry in self.entries if entry.operator == operator]
        if not entries:
            return Choice(form=default, why=f"{default}: nothing was measured for target {self.target}")
        nearest = min(entries, key=lambda entry: _distance(entry.signature, signature))
        alternatives = "; ".join(str(trial) for trial in nearest.tried)
        measured = f" ({alternatives})" if alternatives else ""
        if nearest.signature == signature:
            return Choice(form=nearest.form, why=f"{nearest.form}, measured for this shape{measured}")
        return Choice(form=nearest.form, why=f"{nearest.form}, as for {_words(nearest.signature)}{measured}")

    def entry(self, operator: str, signature: Signature) -> FormEntry | None:
        """The entry of exactly this signature."""
        return next((item for item in self.entries if (item.operator, item.signature) == (operator, signature)), None)

    def with_entries(self, entries: tuple[FormEntry, ...]) -> FormTable:
        """This table with other entries in front; what they replace is dropped."""
        new = {_key(entry): entry for entry in reversed(entries)}
        kept = [entry for entry in self.entries if _key(entry) not in new]
        return self.model_copy(update={"entries": (*reversed(new.values()), *kept)})

    def forced(self, forms: dict[str, str]) -> FormTable:
        """A table that answers with one form per operator, whatever the shape; other operators keep their entries."""
        kept = tuple(entry for entry in self.entries if entry.operator not in forms)
        new = tuple(FormEntry(operator=name, signature={}, form=form) for name, form in forms.items())
        return self.model_copy(update={"entries": (*new, *kept)})

    def save(self, path: Path) -> None:
        """Writes atomically, one entry per line."""
        head = json.dumps({"schema_version": self.schema_version, "target": self.target})[:-1]
        lines = [json.dumps(entry.model_dump(mode="json", exclude_defaults=True)) for entry in self.entries]
        write_text(path, f'{head}, "entries": [\n' + ",\n".join(lines) + "\n]}\n")

    @classmethod
    def load(cls, path: Path) -> FormTable:
        """Reads a table. Raises ``ModelError`` when the file is absent or not one of ours."""
        return read_record(cls, path, ModelError, "`qdexport search` writes such a table")


@functools.cache
def shipped_forms(target: str) -> FormTable:
    """The table that comes with qdexport; an empty one for a target that has none."""
    file = resources.files("qdexport").joinpath(_FOLDER, f"{target}.json")
    if not file.is_file():
        return FormTable(target=target)
    return FormTable.model_validate_json(file.read_text(encoding="utf-8"))


def _distance(measured: Signature, wanted: Signature) -> tuple[int, float, float]:
    shared = [name for name in wanted if name in measured]
    categories = sum(measured[name] != wanted[name] for name in shared if isinstance(wanted[name], str))
    ratios = [_log_ratio(measured[name], wanted[name]) for name in shared if not isinstance(wanted[name], str)]
    return categories, ratios[0] if ratios else 0.0, sum(ratios)


def _log_ratio(a: str | int, b: str | int) -> float:
    return abs(log2(max(int(a), 1) / max(int(b), 1)))


def _key(entry: FormEntry) -> str:
    return json.dumps([entry.operator, entry.signature], sort_keys=True)


def _words(signature: Signature) -> str:
    return ", ".join(f"{name} {value}" for name, value in signature.items()) or "every shape"
