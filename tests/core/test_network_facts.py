"""The facts in an ONNX file's metadata, and the schedules they allow."""

from __future__ import annotations

import pytest

from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.core.network_facts import METADATA_KEY, NetworkFacts
from qdexport.errors import ModelError

BATCH = Dim(name="batch", low=1, best=2, high=8)
SAMPLE = TensorSpec(name="sample", role="sample", dtype="float32", dims=(BATCH, Dim(low=4, best=4, high=4)))


def facts(table: tuple[int, ...] | None = (981, 1)) -> NetworkFacts:
    return NetworkFacts(
        model="shapes", recipe="w8a8", recipe_digest="ab", target="tensorrt-rtx", body="fp32",
        scheduler="DDIMScheduler", training_steps=1000, time_table=table, scale_rows=(),
        io=IoSpec(inputs=(SAMPLE,), outputs=()),
    )  # fmt: skip


def test_round_trip_through_metadata() -> None:
    metadata = facts().to_metadata()
    assert list(metadata) == [METADATA_KEY]
    assert NetworkFacts.from_metadata(metadata, "model.onnx") == facts()


def test_a_file_from_elsewhere() -> None:
    with pytest.raises(ModelError, match=r"model\.onnx was not written by qdexport"):
        NetworkFacts.from_metadata({}, "model.onnx")


def test_shapes_at_the_ends_of_the_ranges() -> None:
    assert [SAMPLE.shape(end) for end in ("low", "best", "high")] == [(1, 4), (2, 4), (8, 4)]
    assert BATCH.dynamic
    assert facts().io.by_role("sample") == SAMPLE
    assert facts().io.by_role("text") is None


@pytest.mark.parametrize("table", [(981, 1), None])
def test_steps_that_have_rows(table: tuple[int, ...] | None) -> None:
    facts(table).check_timesteps([1, 981.0])


def test_a_step_without_a_row_names_scheduler_and_way_out() -> None:
    with pytest.raises(
        ModelError,
        match=r"2 steps of DDIMScheduler .* no row for timesteps \[2, 3\]; .*`time_embedding: all`",
    ):
        facts().check_timesteps([1, 2, 3])
    facts(None).check_timesteps([2, 3])


@pytest.mark.parametrize("table", [(981, 1), None])
@pytest.mark.parametrize("step", [-1, 1000])
def test_a_step_outside_the_training_range(table: tuple[int, ...] | None, step: int) -> None:
    with pytest.raises(ModelError, match=rf"timesteps \[{step}\] are outside the training range 0\.\.999"):
        facts(table).check_timesteps([1, step])
