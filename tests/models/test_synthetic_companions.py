"""Published configurations of VAE decoders and text encoders have the published sizes."""

from __future__ import annotations

import pytest

from qdexport.errors import ModelError
from qdexport.models.synthetic_companions import COMPANION_CONFIGS, _empty, random_companion


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("sd15-vae", 49.49), ("sdxl-vae", 49.49), ("sd15-text", 123.06), ("sdxl-text", 123.06),
        ("sd21-text", 340.39), ("sdxl-text-2", 694.66), ("sd3-vae", 49.55), ("flux-vae", 49.55),
        ("sd3-text", 123.65), ("sd3-text-2", 694.66), ("flux-text", 123.06),
        ("sd3-text-3", 4762.31), ("flux-text-2", 4762.31), ("pixart-text", 4762.31), ("t5-blocks", 903.39),
    ],
)  # fmt: skip
def test_sizes(name: str, millions: float) -> None:
    """Of the checkpoints that are published; of a VAE the decoder and the convolution in front of it."""
    parameters = sum(item.numel() for item in _empty(COMPANION_CONFIGS[name]).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.01)


def test_every_configuration_is_measured() -> None:
    assert len(COMPANION_CONFIGS) == 15
    with pytest.raises(ModelError, match="no synthetic network 'vae'; there are sd15-vae"):
        random_companion("vae", "tensorrt-rtx")


def test_one_is_like_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of SDXL's second encoder: named as beside the first, in FP16, with positions from 0 on."""
    monkeypatch.setitem(COMPANION_CONFIGS["sdxl-text-2"].config, "num_hidden_layers", 2)
    monkeypatch.setitem(COMPANION_CONFIGS["sdxl-text-2"].config, "vocab_size", 100)
    made = random_companion("sdxl-text-2", "tensorrt-rtx")
    assert [spec.name for spec in made.facts.io.outputs] == ["encoder_hidden_states_2", "text_embeds"]
    assert [spec.dtype for spec in made.facts.io.outputs] == ["float16", "float16"]
    positions = dict(made.network.named_buffers())
    assert [buffer.tolist()[0][:3] for buffer in positions.values()] == [[0, 1, 2]]
