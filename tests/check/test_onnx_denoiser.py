from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from qdexport.check.calls import fake_quant_denoiser
from qdexport.check.measure import sqnr_db
from qdexport.check.onnx_denoiser import OnnxDenoiser
from qdexport.errors import ModelError, ParityError
from qdexport.models.sampling import SampleRequest, sample
from tests.check.conftest import Compiled


def call_of(compiled: Compiled, rows: int) -> dict[str, torch.Tensor]:
    index = torch.arange(rows) % 2
    inputs = compiled.calls[0].inputs
    return {name: inputs[name][index].float() for name in ("sample", "encoder_hidden_states")}


def test_any_number_of_rows_and_both_ways_of_returning(static: Compiled) -> None:
    denoiser = OnnxDenoiser(static.path, static.io, static.model.loaded.denoiser)
    inputs, timestep = call_of(static, 5), static.calls[0].inputs["timestep"]
    arguments = (inputs["sample"], timestep)
    text = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    (as_tuple,) = denoiser(*arguments, **text, return_dict=False)
    as_object = denoiser(*arguments, **text).sample
    assert as_tuple.shape == inputs["sample"].shape
    assert torch.equal(as_tuple, as_object)
    # rows repeat after two, whatever call they were put into
    assert torch.equal(as_tuple[:2], as_tuple[2:4])
    assert torch.equal(as_tuple[0], as_tuple[4])


def test_it_looks_like_the_unet_it_stands_for(static: Compiled) -> None:
    unet = static.model.loaded.denoiser
    denoiser = OnnxDenoiser(static.path, static.io, unet)
    assert denoiser.config is unet.config
    assert denoiser.dtype == torch.float32
    assert denoiser.device == torch.device("cpu")
    assert list(denoiser.parameters()) == []


def test_a_pipeline_of_another_dtype_samples_with_it(stepped: Compiled) -> None:
    model = stepped.model
    request = SampleRequest(prompts=("a", "b"), steps=3, guidance_scale=3.0, batch_size=2)
    images = {
        name: sample(model.loaded, request, denoiser=denoiser)
        for name, denoiser in {
            "quantized": fake_quant_denoiser(model),
            "onnx": OnnxDenoiser(stepped.path, stepped.io, model.loaded.denoiser),
        }.items()
    }
    assert images["onnx"].shape == (2, 3, 16, 16)
    # FP16 rounding flips a few codes; images of two different quantizations would be 20 dB apart
    assert sqnr_db(images["quantized"], images["onnx"]) > 20


def test_a_file_that_does_not_fit_is_named(static: Compiled, tmp_path: Path) -> None:
    proto = onnx.load(static.path)
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16
    path = tmp_path / "other.onnx"
    onnx.save(proto, path)
    inputs = call_of(static, 2)
    with pytest.raises(ParityError, match=r"other\.onnx"):
        OnnxDenoiser(path, static.io, static.model.loaded.denoiser)(
            inputs["sample"],
            static.calls[0].inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
        )


def test_a_timestep_or_class_without_a_row_is_refused(static: Compiled) -> None:
    denoiser = OnnxDenoiser(static.path, static.io, static.model.loaded.denoiser)
    inputs = call_of(static, 2)
    text = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    for timestep, words in ((-1, "outside the training range"), (1000, "outside the training range"), (41.5, "keep")):
        with pytest.raises(ModelError, match=words):
            denoiser(inputs["sample"], torch.tensor(timestep), **text)
    with pytest.raises(ModelError, match=r"has no row for timesteps \[41\]"):
        denoiser(inputs["sample"], torch.tensor(41), **text)
    step = static.calls[0].timestep
    denoiser(inputs["sample"], torch.tensor(step + 1e-4), **text)  # whole but for rounding
    denoiser._facts = denoiser._facts.model_copy(update={"labels": 10})
    call = {"sample": inputs["sample"], "timestep": torch.tensor([1]), **text, "class_labels": torch.tensor([3, -1])}
    with pytest.raises(ModelError, match=r"class labels \[-1\] are outside 0\.\.9"):
        denoiser._predict(call)


def test_nan_is_an_error_that_names_the_cause(static: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = OnnxDenoiser(static.path, static.io, static.model.loaded.denoiser)
    monkeypatch.setattr(denoiser, "_run", lambda inputs: inputs["sample"] * torch.nan)
    inputs, step = call_of(static, 2), static.calls[0].timestep
    with pytest.raises(ParityError, match=rf"predicts NaN at timestep {step:g}: a table has no row for this call"):
        denoiser(inputs["sample"], torch.tensor(step), encoder_hidden_states=inputs["encoder_hidden_states"])
