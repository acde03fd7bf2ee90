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
        match=r"2 steps of DDIMScheduler .* no row for timesteps \[2, 3\]; .*`time_embedding: all` .*embedding: keep`",
    ):
        facts().check_timesteps([1, 2, 3])
    facts(None).check_timesteps([2, 3])


@pytest.mark.parametrize("table", [(981, 1), None])
@pytest.mark.parametrize("step", [-1, 1000])
def test_a_step_outside_the_training_range(table: tuple[int, ...] | None, step: int) -> None:
    with pytest.raises(ModelError, match=rf"timesteps \[{step}\] are outside the training range 0\.\.999"):
        facts(table).check_timesteps([1, step])


@pytest.mark.parametrize("table", [(981, 1), tuple(range(1000)), None])
def test_a_fraction_where_the_network_takes_whole_steps_names_both_ways_out(table: tuple[int, ...] | None) -> None:
    with pytest.raises(ModelError, match=r"timesteps \[0.5\].*`timestep_spacing: leading`.*`time_embedding: keep`"):
        facts(table).check_timesteps([1, 0.5])
    facts(table).check_timesteps([981.0001, 0.9999])  # whole but for rounding


def fractional(table: tuple[float, ...] | None, **changes: object) -> NetworkFacts:
    timestep = TensorSpec(name="timestep", role="timestep", dtype="float32", dims=(Dim(low=1, best=1, high=1),))
    return facts().model_copy(
        update={"io": IoSpec(inputs=(SAMPLE, timestep), outputs=()), "time_table": table, **changes}
    )


def test_fractions_where_the_network_takes_them() -> None:
    fractional(None).check_timesteps([999.0, 856.2857, 0.0])
    fractional((999, 856.2857)).check_timesteps([999.0, 856.2861])
    every = fractional((*range(1000), 856.2857))
    every.check_timesteps([41, 856.2861, 999])
    with pytest.raises(ModelError, match=r"timesteps \[856.5\].*`timestep_spacing: leading`.*`time_embedding: keep`"):
        every.check_timesteps([41, 856.5])
    with pytest.raises(ModelError, match="are outside the training range"):
        every.check_timesteps([float("nan")])


def test_steps_on_another_scale_have_bounds_of_their_own() -> None:
    edm = fractional((1.0955, -1.5537), timestep_bounds=(-1.5537, 999))
    edm.check_timesteps([1.0955, -1.5537])
    with pytest.raises(ModelError, match=r"no row for timesteps \[-1.0\]"):
        edm.check_timesteps([-1.0])
    with pytest.raises(ModelError, match=r"outside the training range -1\.5537\.\.999"):
        edm.check_timesteps([-2.0])


def test_rounded_steps_of_flow_matching() -> None:
    flow = fractional((1000.0, 857.1428), timestep_bounds=(0, 1000), timestep_rounding=2.0**-10)
    flow.check_timesteps([1000.0, 857.0])
    with pytest.raises(ModelError) as caught:
        flow.check_timesteps([850.0])
    assert "keep" in str(caught.value)
    assert "`time_embedding: all`" not in str(caught.value)  # it has no last fraction


def test_labels_outside_the_table() -> None:
    facts().check_labels([-1, 5000])  # no table, no limit
    classes = facts().model_copy(update={"labels": 10})
    classes.check_labels([0, 9])
    with pytest.raises(ModelError, match=r"class labels \[-1, 10\] are outside 0\.\.9: the model knows 10 classes"):
        classes.check_labels([3, -1, 10])
