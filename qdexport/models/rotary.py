"""Rotary embeddings of FLUX in a form that can be exported: rows of tables in place of FP64 frequencies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from qdexport.models.denoiser_classes import FLUX, config_of, family_of

__all__ = ["POSITIONS", "RotaryTables", "exportable", "out_of_range"]

POSITIONS: Final = 1024  # rows and columns of latent tokens: pictures of up to 16384 pixels
_POSITION_INPUTS: Final = ("img_ids", "txt_ids")


class RotaryTables(nn.Module):
    """What `FluxPosEmbed` gives for whole positions, looked up: diffusers computes `cos(p f)` in FP64, which TensorRT
    does not have, and rounds to FP32. The tables hold those FP32 numbers, so that nothing changes.

    Args:
        theta: base of the frequencies.
        axes: widths of the axes of a position.
    """

    def __init__(self, theta: int, axes: tuple[int, ...]) -> None:
        super().__init__()
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        self.axes = len(axes)
        positions = torch.arange(POSITIONS).float()
        for axis, width in enumerate(axes):
            cos, sin = get_1d_rotary_pos_embed(
                width, positions, theta=theta, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
            )
            self.register_buffer(f"cos_{axis}", cos, persistent=False)
            self.register_buffer(f"sin_{axis}", sin, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, FP32 ``[S, D]`` each, of positions INT64 ``[S, axes]``; see `out_of_range`."""
        # TensorRT has Max and Min of whole numbers, but no Clip
        rows = torch.minimum(torch.maximum(ids, torch.zeros_like(ids)), torch.full_like(ids, POSITIONS - 1))
        cos = torch.cat([self.get_buffer(f"cos_{axis}")[rows[:, axis]] for axis in range(self.axes)], dim=-1)
        sin = torch.cat([self.get_buffer(f"sin_{axis}")[rows[:, axis]] for axis in range(self.axes)], dim=-1)
        return cos, sin


def out_of_range(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """0 where the tables have every position of a call, else NaN, FP32 scalar; None for a call without positions.

    Added to the prediction: behind quantizers a NaN would be a code like any other.
    """
    guards = [_guard(inputs[name]) for name in _POSITION_INPUTS if name in inputs]
    return torch.stack(guards).sum() if guards else None


def _guard(ids: Tensor) -> Tensor:
    outside = (ids < 0) | (ids >= POSITIONS)
    return torch.where(outside, torch.nan, 0.0).sum()


@contextlib.contextmanager
def exportable(denoiser: nn.Module) -> Iterator[None]:
    """Gives a FLUX denoiser its tables inside the block; other denoisers are left alone."""
    if family_of(denoiser) != FLUX:
        yield
        return
    own: Any = denoiser.get_submodule("pos_embed")
    axes = tuple(config_of(denoiser)["axes_dims_rope"])
    denoiser.register_module("pos_embed", RotaryTables(own.theta, axes))
    try:
        yield
    finally:
        denoiser.register_module("pos_embed", own)
