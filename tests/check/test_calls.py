from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdexport.check.calls import check_calls, fit_inputs, row_chunks, spread
from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.errors import ModelError, ParityError
from qdexport.quant.bos import Bos
from tests.check.conftest import Compiled


def io_of(low: int, high: int) -> IoSpec:
    batch, one = Dim(name="batch", low=low, best=low, high=high), Dim(low=1, best=1, high=1)
    return IoSpec(
        inputs=(
            TensorSpec(name="sample", role="sample", dtype="float16", dims=(batch, one)),
            TensorSpec(name="timestep", role="timestep", dtype="int64", dims=(one,)),
        ),
        outputs=(),
    )


@given(st.integers(1, 40), st.integers(2, 50))
def test_spread_holds_both_ends_and_even_distances(length: int, count: int) -> None:
    chosen = spread(range(length), count)
    assert chosen[0] == 0
    assert chosen[-1] == length - 1
    assert len(chosen) == min(length, count)
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    assert (gaps > 0).all()


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 6))
def test_chunks_hold_every_row_once(rows: int, low: int, room: int) -> None:
    inputs = {"sample": torch.arange(float(rows))[:, None], "timestep": torch.tensor([5])}
    found = []
    for part, count in row_chunks(inputs, io_of(low, low + room)):
        assert low <= len(part["sample"]) <= low + room
        assert part["timestep"].tolist() == [5]
        found += part["sample"][:count, 0].tolist()
    assert found == list(range(rows))


def test_inputs_get_the_networks_dtypes_and_rows() -> None:
    inputs = {"sample": torch.ones(5, 1), "timestep": torch.tensor([5]), "unused": torch.ones(1)}
    fitted = fit_inputs(inputs, io_of(2, 2))
    assert list(fitted) == ["sample", "timestep"]
    assert fitted["sample"].dtype == torch.float16
    assert fitted["sample"].shape == (2, 1)
    assert fitted["timestep"].dtype == torch.int64


def _io_with_residuals() -> IoSpec:
    io = io_of(2, 2)
    residual = TensorSpec(name="mid_block_res", role="residual", dtype="float16", dims=io.inputs[0].dims)
    return io.model_copy(update={"inputs": (*io.inputs, residual)})


def test_residuals_that_a_call_lacks_are_zero_and_those_that_a_network_lacks_are_refused() -> None:
    call = {"sample": torch.ones(2, 1), "timestep": torch.tensor([5])}
    fitted = fit_inputs(call, _io_with_residuals())
    assert torch.equal(fitted["mid_block_res"], torch.zeros(2, 1, dtype=torch.float16))
    given_residual = {**call, "mid_block_res": torch.ones(2, 1)}
    assert torch.equal(fit_inputs(given_residual, _io_with_residuals())["mid_block_res"], torch.ones(2, 1).half())
    with pytest.raises(ParityError, match=r"compile it with shapes\.controlnet: true"):
        fit_inputs(given_residual, io_of(2, 2))


def test_a_fraction_is_not_cut_off() -> None:
    with pytest.raises(ModelError, match=r"asks for timesteps \[957\.5\], and the network has a table of whole ones"):
        fit_inputs({"sample": torch.ones(2, 1), "timestep": torch.tensor([957.5])}, io_of(2, 2))
    whole = fit_inputs({"sample": torch.ones(2, 1), "timestep": torch.tensor([956.9999])}, io_of(2, 2))
    assert torch.equal(whole["timestep"], torch.tensor([957]))


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ParityError, match="lacks timestep; it has sample"):
        fit_inputs({"sample": torch.ones(2, 1)}, io_of(2, 2))


def test_calls_of_a_sampler_are_at_both_ends_of_its_schedule(stepped: Compiled) -> None:
    calls = check_calls(stepped.model, stepped.io, 2, seed=0, batches=2)
    ends = [stepped.model.timesteps[0], stepped.model.timesteps[-1]]
    assert [call.timestep for call in calls] == ends * 2
    assert [call.batch for call in calls] == [0, 0, 1, 1]
    assert calls[0].inputs["sample"].dtype == torch.float16
    assert not torch.equal(calls[0].inputs["sample"], calls[2].inputs["sample"])


def test_calls_are_the_same_for_a_seed(stepped: Compiled) -> None:
    again = check_calls(stepped.model, stepped.io, 3, seed=0)
    for call, other in zip(stepped.calls, again, strict=True):
        assert all(torch.equal(tensor, other.inputs[name]) for name, tensor in call.inputs.items())


def test_without_a_sampler_calls_are_random_at_the_calibrated_timesteps(static: Compiled) -> None:
    model = SimpleNamespace(loaded=SimpleNamespace(pipeline=None), timesteps=(900, 700, 500, 100, 1), bos=None)
    calls = check_calls(model, static.io, 3, seed=0, batches=2)
    assert [call.timestep for call in calls] == [900, 500, 1] * 2
    assert [int(call.inputs["timestep"]) for call in calls] == [900, 500, 1] * 2
    samples = [call.inputs["sample"] for call in calls]
    assert not any(torch.equal(a, b) for i, a in enumerate(samples) for b in samples[:i])


def test_random_text_begins_with_the_known_first_token() -> None:
    """Any other one would read NaN from the network."""
    dims = tuple(Dim(low=size, best=size, high=size) for size in (2, 5, 8))
    one = (Dim(low=1, best=1, high=1),)
    io = IoSpec(
        inputs=(
            TensorSpec(name="timestep", role="timestep", dtype="int64", dims=one),
            TensorSpec(name="encoder_hidden_states", role="text", dtype="float16", dims=dims),
        ),
        outputs=(),
    )
    bos = Bos(embedding=torch.linspace(-300, 300, 8))
    model = SimpleNamespace(loaded=SimpleNamespace(pipeline=None), timesteps=(900, 1), bos=bos)
    for call in check_calls(model, io, 2, seed=0):
        text = call.inputs["encoder_hidden_states"]
        assert text.dtype == torch.float16
        assert torch.equal(text[:, 0], bos.embedding.half().expand(2, 8))
        assert not torch.equal(text[:, 1], text[:, 0])
