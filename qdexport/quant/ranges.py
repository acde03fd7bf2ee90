"""Activation ranges: what a calibration finds, or what a user brings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qdexport.core.files import atomic_path
from qdexport.core.reading import read_json_file, reading
from qdexport.core.spec import LayerPlan
from qdexport.errors import ModelError
from qdexport.models.weights import open_safetensors
from qdexport.quant.bos import Bos
from qdexport.quant.plan import activation_keys
from qdexport.quant.softmax import SoftmaxParameters

__all__ = ["ActivationRanges", "given_ranges", "load_ranges"]

_METADATA_KEY = "qdexport.activation_ranges"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRanges:
    """The range of every quantized layer's input.

    Attributes:
        low: smallest value to represent by activation key (a group's name, or ``group#part``), float64
            ``[rows]``.
        high: largest value, same keys and shapes.
        timesteps: the sampler's timesteps that were calibrated, in sampling order; with more than one row,
            row i is the i-th timestep's. Empty when the ranges were given.
        channel_ratios: what the channels of an input are divided by, FP32 ``[C]``, by activation group; the
            ranges are those of the quotients.
        softmax: the quantizers behind attention, by attention block.
        bos: the text's first token, where layers leave it out.
    """

    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]
    timesteps: tuple[float, ...] = field(default=())
    channel_ratios: Mapping[str, Tensor] = field(default_factory=dict)
    softmax: Mapping[str, SoftmaxParameters] = field(default_factory=dict)
    bos: Bos | None = None

    @property
    def rows(self) -> int:
        """Rows of the step tables; 1 is static."""
        return max((len(tensor) for tensor in self.low.values()), default=1)

    def save(self, path: Path) -> None:
        """Writes a safetensors file atomically: ``<key>/low``, ``<key>/high`` and what else there is."""
        tensors = {f"{key}/low": tensor.contiguous() for key, tensor in self.low.items()}
        tensors |= {f"{key}/high": tensor.contiguous() for key, tensor in self.high.items()}
        tensors |= {f"{group}/ratio": tensor.contiguous() for group, tensor in self.channel_ratios.items()}
        for name, parameters in self.softmax.items():
            tensors |= {f"{name}/softmax_scale": parameters.scale, f"{name}/softmax_mode": parameters.mode}
        if self.bos is not None:
            tensors["bos"] = self.bos.embedding.contiguous()
        facts = {
            "version": _VERSION,
            "timesteps": list(self.timesteps),
            "softmax_bits": {name: parameters.bits for name, parameters in self.softmax.items()},
            "encoder": "" if self.bos is None else self.bos.encoder,
        }
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata={_METADATA_KEY: json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> ActivationRanges:
        """Reads what :meth:`save` wrote.

        Raises:
            ModelError: no such file, not one of ours, or cut short.
        """
        if not path.exists():
            raise ModelError(f"activation ranges {path} do not exist; calibrate first, or name another file")
        with reading(f"activation ranges {path}", ModelError, "calibrate again"):
            return cls._load(path)

    @classmethod
    def _load(cls, path: Path) -> ActivationRanges:
        with open_safetensors(path, "calibrate again") as file:
            facts = json.loads((file.metadata() or {}).get(_METADATA_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        if not isinstance(facts, dict) or facts.get("version") != _VERSION:
            raise ModelError(f"{path} holds no activation ranges of qdexport (version {_VERSION}); calibrate again")
        ends = {
            end: {name.removesuffix(f"/{end}"): t for name, t in tensors.items() if name.endswith(f"/{end}")}
            for end in ("low", "high", "ratio", "softmax_scale", "softmax_mode")
        }
        softmax = {}
        for name, bits in facts.get("softmax_bits", {}).items():
            if name not in ends["softmax_scale"] or name not in ends["softmax_mode"]:
                raise ModelError(f"activation ranges {path} lack the softmax quantizer of {name}; calibrate again")
            scale, mode = ends["softmax_scale"][name], ends["softmax_mode"][name]
            softmax[name] = SoftmaxParameters(bits=int(bits), scale=scale, mode=mode)
        return cls(
            low=ends["low"],
            high=ends["high"],
            timesteps=tuple(facts["timesteps"]),
            channel_ratios=ends["ratio"],
            softmax=softmax,
            bos=Bos(embedding=tensors["bos"], encoder=facts.get("encoder", "")) if "bos" in tensors else None,
        )

    def check(self, plans: Sequence[LayerPlan], source: str = "activation ranges") -> None:
        """Makes sure that every quantized layer has a usable range.

        Raises:
            ModelError: a missing range (with the nearest names), the wrong number of rows, NaN, infinity, or
                low above high.
        """
        for plan in plans:
            for key in activation_keys(plan):
                if key not in self.low or key not in self.high:
                    near = difflib.get_close_matches(key, list(self.low), n=2)
                    hint = f"; near: {', '.join(near)}" if near else ""
                    raise ModelError(f"{source}: no range for {key!r}, the input of layer {plan.name}{hint}")
                self._check_values(key, plan.name, source)
            if not plan.quantized:
                continue
            if plan.channel_scale and plan.group not in self.channel_ratios:
                raise ModelError(f"{source}: no channel ratios for {plan.group!r}, the input of layer {plan.name}")

    def _check_values(self, key: str, layer: str, source: str) -> None:
        low, high = self.low[key], self.high[key]
        where = f"{source}: the range of {key!r}, the input of layer {layer},"
        if low.shape != high.shape or low.dim() != 1 or len(low) not in (1, self.rows):
            raise ModelError(
                f"{where} has shapes {list(low.shape)} and {list(high.shape)}, expected [{self.rows}] rows"
            )
        if len(low) > 1 and len(low) != len(self.timesteps):
            raise ModelError(f"{where} has {len(low)} rows for {len(self.timesteps)} timesteps")
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise ModelError(f"{where} holds NaN or infinity")
        if bool((low > high).any()):
            row = int((low > high).nonzero()[0])
            raise ModelError(f"{where} has low {float(low[row])} above high {float(high[row])} in row {row}")


def given_ranges(plans: Sequence[LayerPlan], low: float, high: float) -> ActivationRanges:
    """One static range for every quantized layer: for models whose weights are random, where sampling tells
    nothing.
    """
    keys = {key for plan in plans for key in activation_keys(plan)}
    ranges = ActivationRanges(
        low={key: torch.tensor([low], dtype=torch.float64) for key in sorted(keys)},
        high={key: torch.tensor([high], dtype=torch.float64) for key in sorted(keys)},
    )
    ranges.check(plans, f"given range {low}..{high}")
    return ranges


def load_ranges(path: Path, plans: Sequence[LayerPlan]) -> ActivationRanges:
    """Reads ranges from a user's file.

    Either a safetensors file of :meth:`ActivationRanges.save`, or JSON: ``{"<layer or group>": [low, high]}``
    with numbers, or with two lists of one number per row next to ``"timesteps": [...]``. A layer's name
    counts for its whole group, and for all its parts that are not named themselves (``layer#0``).

    Raises:
        ModelError: the file cannot be read, names an unknown layer, or leaves a layer without a range.
    """
    ranges = ActivationRanges.load(path) if path.suffix != ".json" else _ranges_from_json(path, plans)
    ranges.check(plans, str(path))
    return ranges


def _ranges_from_json(path: Path, plans: Sequence[LayerPlan]) -> ActivationRanges:
    data = read_json_file(path, ModelError)
    if not isinstance(data, dict):
        raise ModelError(f'{path} must hold an object {{"layer": [low, high]}}, not a JSON {type(data).__name__}')
    timesteps = data.pop("timesteps", [])
    if not isinstance(timesteps, list) or not all(type(step) in {int, float} for step in timesteps):
        raise ModelError(f"{path}: timesteps must be a list of numbers, one per row")
    keys = _keys_by_name(plans)
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    for name, ends in data.items():
        if name not in keys:
            near = difflib.get_close_matches(name, list(keys), n=2)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ModelError(f"{path}: {name!r} is no quantized layer of this model{hint}")
        lower, upper = _two_ends(path, name, ends)
        for key in keys[name]:
            if len(keys[name]) == 1 or key not in low:
                low[key], high[key] = lower, upper
    return ActivationRanges(low=low, high=high, timesteps=tuple(timesteps))


def _keys_by_name(plans: Sequence[LayerPlan]) -> dict[str, tuple[str, ...]]:
    """Activation keys by key, by group, and by the names of layers and parts that read them."""
    keys: dict[str, tuple[str, ...]] = {}
    for plan in plans:
        if plan.quantized:
            own = activation_keys(plan)
            keys |= {plan.group: own, plan.name: own}
            keys |= {part: (key,) for part, key in zip(plan.parts, own, strict=True)}
            keys |= {key: (key,) for key in own}
    return keys


def _two_ends(path: Path, name: str, ends: Any) -> tuple[Tensor, Tensor]:
    try:
        low, high = (torch.tensor(end, dtype=torch.float64).reshape(-1) for end in ends)
    except Exception as error:
        raise ModelError(f"{path}: {name!r} must be [low, high], not {json.dumps(ends)[:80]}") from error
    return low, high
