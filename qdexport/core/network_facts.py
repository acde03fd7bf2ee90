"""What an exported network says about itself, stored in the ONNX file's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from qdexport.core.io_spec import IoSpec
from qdexport.core.reading import reading
from qdexport.core.timesteps import reach_of, row_at, whole_step
from qdexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["METADATA_KEY", "NetworkFacts", "no_fractions"]

METADATA_KEY = "qdexport"
_SHOWN = 5


class NetworkFacts(BaseModel):
    """Facts that whoever runs the network needs.

    Attributes:
        model: name of the model.
        recipe: name of the recipe.
        recipe_digest: digest of the resolved recipe.
        target: target it was lowered for.
        body: type of what is not quantized.
        scheduler: class name of the scheduler whose steps the tables hold; empty when there was none.
        training_steps: valid timesteps are 0 up to this, exclusive.
        timestep_bounds: smallest and largest timestep of a call; None: 0 and the last of the training.
        timestep_rounding: by what share of itself a pipeline in half precision rounds a fractional timestep.
        time_table: exact timesteps with a row in the time table; None when the time layers are in the graph.
        scale_rows: timesteps of the activation rows; a single static row is an empty list.
        labels: how many classes the network's table has, numbered from 0; None where it reads no numbers of classes.
        io: inputs and outputs.
        notes: by module path, what became of a mechanism in this file (where a channel scale went, for instance).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    recipe: str
    recipe_digest: str
    target: str
    body: str
    scheduler: str
    training_steps: int
    timestep_bounds: tuple[int | float, int | float] | None = None
    timestep_rounding: float = 0.0
    time_table: tuple[int | float, ...] | None
    scale_rows: tuple[int | float, ...]
    labels: int | None = None
    io: IoSpec
    notes: dict[str, str] = Field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the ONNX file."""
        return {METADATA_KEY: self.model_dump_json()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: str) -> NetworkFacts:
        """Reads what :meth:`to_metadata` wrote. Raises ``ModelError`` for an ONNX file from elsewhere."""
        text = metadata.get(METADATA_KEY)
        if text is None:
            raise ModelError(f"{source} was not written by qdexport: it does not say which timesteps it holds")
        with reading(source, ModelError, "export it again", what="holds facts that this qdexport cannot read"):
            return cls.model_validate_json(text)

    def check_call(self, inputs: Mapping[str, Any]) -> None:
        """Refuses a call that the network has no answer for; every runner asks this before it runs.

        Args:
            inputs: tensors or arrays of the call by name; what the network does not read may be missing.

        Raises:
            ModelError: as :meth:`check_timesteps` and :meth:`check_labels`.
        """
        if "timestep" in inputs:
            self.check_timesteps(inputs["timestep"].ravel().tolist())
        if "class_labels" in inputs and self.labels is not None:
            self.check_labels(inputs["class_labels"].ravel().tolist())

    def check_timesteps(self, timesteps: Iterable[float]) -> None:
        """Refuses a schedule that the network has no rows for.

        Raises:
            ModelError: a timestep outside the training range, one that the time table lacks, or a fraction where the
                network takes whole numbers; the message says what to do.
        """
        steps = list(timesteps)
        low, high = self.timestep_bounds or (0, self.training_steps - 1)
        # a pipeline in half precision may round the last one up; NaN lies nowhere
        outside = [step for step in steps if not low <= step <= high + reach_of(high, self.timestep_rounding)]
        if outside:
            raise ModelError(f"timesteps {_first(outside)} are outside the training range {low}..{high}")
        spec = self.io.by_role("timestep")
        rows = self.time_table
        fractions = [step for step in steps if whole_step(step) is None]
        if fractions and (spec is None or spec.dtype != "float32"):
            raise ModelError(no_fractions(fractions))
        if rows is None:
            return
        known = set(rows)
        others = [step for step in steps if step not in known]  # equal numbers need no search
        missing = [step for step in others if row_at(rows, step, self.timestep_rounding) is None]
        if not missing:
            return
        every = set(range(self.training_steps)) <= set(rows)
        if every and any(step in fractions for step in missing):
            raise ModelError(no_fractions(missing))
        raise ModelError(
            f"the time table was made for {len(rows)} steps of {self.scheduler or 'the given schedule'} and has "
            f"no row for timesteps {_first(missing)}; sample with that scheduler and number of steps, or compile with "
            f"{'' if self.timestep_rounding else '`time_embedding: all` (one row for every timestep) or '}"
            "`time_embedding: keep` (leave the time layers in the network)"
        )

    def check_labels(self, labels: Iterable[int]) -> None:
        """Refuses classes that the network has no row for.

        Raises:
            ModelError: a number below 0 or beyond the last class.
        """
        wrong = [] if self.labels is None else [label for label in labels if not 0 <= label < self.labels]
        if self.labels is not None and wrong:
            raise ModelError(
                f"class labels {_first(wrong)} are outside 0..{self.labels - 1}: the model knows {self.labels} classes"
            )


def _first(steps: Sequence[float]) -> str:
    return f"{steps[:_SHOWN]}{' ...' if len(steps) > _SHOWN else ''}"


def no_fractions(steps: list[float]) -> str:
    """Why a network of whole timesteps refuses fractions, and what to do."""
    return (
        f"the scheduler asks for timesteps {_first(steps)}, and the network has a table of whole ones; use a spacing "
        "with whole steps (`timestep_spacing: leading` or `trailing`, without Karras, exponential or beta sigmas), or "
        "compile with `time_embedding: keep`, which leaves the time layers in the network"
    )
