"""Pictures of one or four channels, of any size, are compared and shown like others."""

from __future__ import annotations

import json

import diffusers
import pytest
from PIL import Image

from qdexport.models.synthetic import random_unet
from tests.pipeline.conftest import SMALL


@pytest.fixture(params=[(1, 4, 1), (4, (8, 16), 2)], ids=["one channel", "four channels, not square"])
def pixel_model(request, tmp_path):
    """A pipeline without a VAE and without prompts; one-channel pictures are smaller than SSIM's window."""
    channels, size, images = request.param
    unet = random_unet("tiny_unet2d", in_channels=channels, out_channels=channels, sample_size=size)
    pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model", size, images


def test_pictures_of_any_channels_and_size(pixel_model, qdexport, tmp_path):
    model, size, images = pixel_model
    out = tmp_path / "out"
    settings = (*SMALL, "--set", f"validation.images={images}", "--set", "calibration.steps=2")
    result = qdexport("compile", model, "--target", "onnxruntime", "--out", out, *settings)
    assert result.exit_code in (0, 8), result.output  # 8: random weights may not keep their pictures
    scores = json.loads((out / "report.json").read_text())["quality"]["quantized"]
    assert scores["psnr_db"] is not None
    assert (scores.get("ssim") is None) == (size == 4)
    kinds = ("--with", "fp", "--with", "onnx")
    sampled = qdexport("sample", out, *kinds, "--count", images, "--out", tmp_path / "pictures", "--guidance-scale", 1)
    assert sampled.exit_code == 0, sampled.output
    height, width = (size, size) if isinstance(size, int) else size
    with Image.open(tmp_path / "pictures" / "onnx" / "000.png") as picture:
        assert (picture.height, picture.width, picture.mode) == (height, width, "RGB")
    assert (tmp_path / "pictures" / "grid.png").is_file()
