"""What an exported network says about itself, stored in the ONNX file's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from qdexport.core.io_spec import IoSpec
from qdexport.core.reading import reading
from qdexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["METADATA_KEY", "NetworkFacts"]

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
        time_table: exact timesteps with a row in the time table; None when the time layers are in the graph.
        scale_rows: timesteps of the activation rows; a single static row is an empty list.
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
    time_table: tuple[int | float, ...] | None
    scale_rows: tuple[int | float, ...]
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

    def check_timesteps(self, timesteps: Iterable[float]) -> None:
        """Refuses a schedule that the network has no rows for.

        Raises:
            ModelError: a timestep outside the training range, or one that the time table lacks.
        """
        steps = list(timesteps)
        spec = self.io.by_role("timestep")
        # flow matching starts at the end of the range
        last = self.training_steps if spec is not None and spec.dtype == "float32" else self.training_steps - 1
        outside = [step for step in steps if not 0 <= step <= last]
        if outside:
            raise ModelError(f"timesteps {outside[:_SHOWN]} are outside the training range 0..{last}")
        if self.time_table is None:
            return
        known = set(self.time_table)
        missing = [step for step in steps if step not in known]
        if missing:
            raise ModelError(
                f"the time table was made for {len(known)} steps of {self.scheduler or 'the given schedule'} and has "
                f"no row for timesteps {missing[:_SHOWN]}{' ...' if len(missing) > _SHOWN else ''}; sample with "
                "that scheduler and number of steps, or compile with `time_embedding: all` (one row for every "
                "timestep) or `keep` (leave the time layers in the network)"
            )
