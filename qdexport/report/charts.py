"""Geometry of the report's charts: plain numbers; the template draws them as SVG in the page's colours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from qdexport.check.verdict import FLIP_LIMIT
from qdexport.report.facts import IDENTICAL_DB, decibel, number, rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.core.results import LayerParity

__all__ = ["Chart", "error_charts", "flip_chart", "scale_chart", "sqnr_chart"]

_WIDTH = 960.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 944.0, 16.0, 250.0
_CHARACTER = 6.4  # width of one character of an axis label
_WORDS = {
    "mse": "MSE",
    "rmse": "RMSE",
    "sqnr": "SQNR",
    "psnr": "PSNR",
    "snr": "SNR",
    "db": "(dB)",
    "fp": "FP",
}


@dataclass(frozen=True, slots=True)
class Tick:
    """A label on an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A dot, or the head of a bar."""

    x: float
    y: float
    title: str
    tone: str


@dataclass(frozen=True, slots=True)
class Line:
    """A polyline with its legend."""

    label: str
    points: str
    tone: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Band:
    """Neighbouring layers of one block of the model."""

    x: float
    width: float
    label: str
    shaded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart in user units of the drawing; ``base`` is where bars and stems start, None for free dots."""

    title: str
    summary: str
    x_label: str = ""
    y_label: str = ""
    x_ticks: tuple[Tick, ...] = ()
    y_ticks: tuple[Tick, ...] = ()
    bands: tuple[Band, ...] = ()
    marks: tuple[Mark, ...] = ()
    bar_width: float = 0.0
    base: float | None = None
    lines: tuple[Line, ...] = ()
    rule: Tick | None = None
    width: float = _WIDTH
    height: float = 278.0
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM


class _Axis:
    """Maps values to a vertical position, linearly or by logarithm, with round labels."""

    def __init__(self, low: float, high: float, *, log: bool, top: float = _TOP) -> None:
        self.log = log
        if log:
            low = float(math.floor(math.log10(low) + 1e-9))
            high = float(math.ceil(math.log10(high) - 1e-9))
        if high <= low:
            low, high = low - 1, high + 1
        self.low, self.high, self.top = low, high, top

    def at(self, value: float) -> float:
        """The position of a value, in user units."""
        place = math.log10(value) if self.log else value
        share = (place - self.low) / (self.high - self.low)
        return round(_BOTTOM - min(max(share, 0.0), 1.0) * (_BOTTOM - self.top), 2)

    def ticks(self) -> tuple[Tick, ...]:
        """Four to eight round labels."""
        if self.log:
            every = max(1, math.ceil((self.high - self.low) / 8))
            powers = range(int(self.low), int(self.high) + 1, every)
            few = self.high - self.low <= 2
            values = [m * 10.0**p for p in powers for m in ((1, 2, 5) if few else (1,))]
            return tuple(Tick(self.at(v), number(v)) for v in values if math.log10(v) <= self.high + 1e-9)
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first
        return tuple(Tick(self.at((first + i) * step), f"{(first + i) * step:g}") for i in range(count + 1))


def sqnr_chart(layers: Sequence[LayerParity], limit: float) -> Chart | None:
    """SQNR of every layer's output as stems, with the smallest allowed value; None without layers."""
    if not layers:
        return None
    finite = [layer.sqnr_db for layer in layers if layer.sqnr_db < IDENTICAL_DB]
    same = len(layers) - len(finite)
    top = _TOP + 24 if same else _TOP
    axis = _Axis(min([*finite, limit]) - 8, max([*finite, limit]) + 4, log=False, top=top)
    marks = []
    for x, layer in zip(_places(len(layers)), layers, strict=True):
        y = axis.at(layer.sqnr_db) if layer.sqnr_db < IDENTICAL_DB else _TOP + 6
        tone = "ok" if layer.sqnr_db >= limit else "bad"
        marks.append(Mark(x, y, f"{layer.name}: {decibel(layer.sqnr_db)}", tone))
    lane = (Tick(_TOP + 6, "identical"),) if same else ()
    below = sum(layer.sqnr_db < limit for layer in layers)
    return Chart(
        title="SQNR of each layer's output on identical inputs",
        summary=f"{len(layers)} layers: {below} below {limit:.0f} dB, {same} without difference.",
        y_label="dB",
        y_ticks=axis.ticks() + lane,
        marks=tuple(marks),
        base=_BOTTOM,
        bar_width=1.5,
        bands=_bands([layer.name for layer in layers]),
        rule=Tick(axis.at(limit), f"limit {limit:.0f} dB"),
    )


def flip_chart(layers: Sequence[LayerParity]) -> Chart | None:
    """Share of differing activation codes per layer, on a logarithmic axis; None when no code differs."""
    rates = [layer.code_flip_rate for layer in layers]
    seen = [value for value in rates if value > 0]
    if not seen:
        return None
    axis = _Axis(min([*seen, FLIP_LIMIT]) / 2, max([*seen, FLIP_LIMIT]) * 1.5, log=True)
    marks = tuple(
        Mark(
            x,
            axis.at(layer.code_flip_rate),
            f"{layer.name}: {rate(layer.code_flip_rate)}",
            "warn" if layer.code_flip_rate <= FLIP_LIMIT else "bad",
        )
        for x, layer in zip(_places(len(layers)), layers, strict=True)
        if layer.code_flip_rate > 0
    )
    return Chart(
        title="Share of integer codes that differ",
        summary=f"{len(seen)} of {len(layers)} layers have differing codes; largest share {rate(max(seen))}.",
        y_label="share of codes",
        y_ticks=axis.ticks(),
        marks=marks,
        base=_BOTTOM,
        bar_width=_bar_width(len(layers)),
        bands=_bands([layer.name for layer in layers]),
        rule=Tick(axis.at(FLIP_LIMIT), f"limit {rate(FLIP_LIMIT)}"),
    )


def scale_chart(scales: dict[str, float]) -> Chart:
    """One static activation scale per layer, as bars on a logarithmic axis."""
    values = list(scales.values())
    axis = _Axis(min(values) / 1.5, max(values), log=True)
    marks = tuple(
        Mark(x, axis.at(value), f"{name}: {number(value)}", "s0")
        for x, (name, value) in zip(_places(len(values)), scales.items(), strict=True)
    )
    return Chart(
        title="Activation scale of each layer",
        summary=f"{len(values)} layers, scales from {number(min(values))} to {number(max(values))}.",
        y_label="scale",
        y_ticks=axis.ticks(),
        marks=marks,
        base=_BOTTOM,
        bar_width=_bar_width(len(values)),
        bands=_bands(list(scales)),
    )


def error_charts(rows: Sequence[dict[str, float]]) -> list[Chart]:
    """Error against step: one chart for ratios in dB, one for everything else, on a logarithmic axis."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in {"step", "timestep"}))
    made = []
    for decibels in (False, True):
        chosen = [key for key in keys if key.endswith("_db") == decibels]
        chart = _error_chart(rows, chosen, log=not decibels) if chosen else None
        if chart is not None:
            made.append(chart)
    return made


def _error_chart(rows: Sequence[dict[str, float]], keys: list[str], *, log: bool) -> Chart | None:
    values = [row[key] for row in rows for key in keys if _drawable(row.get(key), log=log)]
    if not values:
        return None
    room = 0.0 if log else 0.06 * (max(values) - min(values))
    axis = _Axis(min(values) - room, max(values) + room, log=log)
    places = _places(len(rows))
    lines = []
    for index, key in enumerate(keys):
        tone = f"s{index % 5}"
        marks = tuple(
            Mark(x, axis.at(row[key]), f"{_step_name(row, i)}: {_words(key)} {number(row[key])}", tone)
            for i, (x, row) in enumerate(zip(places, rows, strict=True))
            if _drawable(row.get(key), log=log)
        )
        points = " ".join(f"{mark.x:g},{mark.y:g}" for mark in marks)
        lines.append(Line(_words(key), points, tone, marks))
    every = max(1, math.ceil(len(rows) / 13))
    timesteps = all("timestep" in row for row in rows)
    ticks = tuple(
        Tick(places[i], f"{rows[i]['timestep']:g}" if timesteps else f"{rows[i].get('step', i):g}")
        for i in range(0, len(rows), every)
    )
    return Chart(
        title="Ratio of signal to error at each step" if not log else "Error at each step",
        summary=f"{len(rows)} steps, values from {number(min(values))} to {number(max(values))}.",
        x_label="timestep (sampling runs from left to right)" if timesteps else "step",
        height=300.0,
        x_ticks=ticks,
        y_label="dB" if not log else "error",
        y_ticks=axis.ticks(),
        lines=tuple(lines),
    )


def _drawable(value: float | None, *, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _step_name(row: dict[str, float], index: int) -> str:
    step = f"step {row.get('step', index):g}"
    return f"{step}, timestep {row['timestep']:g}" if "timestep" in row else step


def _words(key: str) -> str:
    return " ".join(_WORDS.get(part, part) for part in key.split("_"))


def _places(count: int) -> list[float]:
    step = (_RIGHT - _LEFT) / count
    return [round(_LEFT + (index + 0.5) * step, 2) for index in range(count)]


def _bar_width(count: int) -> float:
    return round(max(1.0, min(28.0, 0.68 * (_RIGHT - _LEFT) / count)), 2)


def _bands(names: list[str]) -> tuple[Band, ...]:
    step = (_RIGHT - _LEFT) / len(names)
    bands, start = [], 0
    for index, (block, members) in enumerate(groupby(names, key=_block)):
        count = len(list(members))
        label = block if len(block) * _CHARACTER <= count * step else ""
        bands.append(Band(round(_LEFT + start * step, 2), round(count * step, 2), label, index % 2 == 1))
        start += count
    return tuple(bands)


def _block(name: str) -> str:
    """``down_blocks.0.resnets.1`` is in ``down_blocks.0``, ``mid_block.attentions.0`` in ``mid_block``."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
