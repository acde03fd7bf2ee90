"""The table of verdicts as text and as a page, and the contact sheet beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.figure import Figure

from benchmarks.verdict_runs import sheet_path
from qdexport.core.files import atomic_path, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from benchmarks.verdict_runs import Settings

__all__ = ["table_text", "write_docs"]

_PICTURES: Final = 6
_DPI: Final = 80
_INTRODUCTION: Final = """\
# Verdicts, recipe by recipe

Written by `tools/bench_verdict.py --write-docs`; `verdicts.json` beside it holds every run. Each recipe is calibrated
once, and validated with up to {seeds} seeds of validation, which choose prompts and noise. Whether the network is
compiled right is asked in runs of its own, with two pictures.

- **kept**: how often the verdict on the pictures was *kept*.
- **share**: squared error of the pictures as a share of what another seed makes, mean over the seeds; the limit stands
  in the recipe (`validation.pictures.share`).
- **texture**, **contrast**: the factors by which differences of neighbouring pixels and the deviation of pictures
  change (`validation.pictures.texture`, `.contrast`), farthest from 1 over the seeds.
- **margin**: the factor by which a run lies off its limit, in the closest of the runs: the nearest of share (by
  the deciding end of its interval), texture and contrast where pictures are kept, the farthest where they are not
  (of the latter two as logarithms; below 1 where alignment decided); of the compiled network the decibels by which the
  worst layer or the whole network lies above its threshold.
- **same**: whether every seed gave the same verdict; empty for a single seed.

An empty cell was not measured.

*Naive* and *MSE ranges* are those of [quality.md](quality.md).
"""

_REPEAT: Final = """\
## To repeat it

```
python tools/train_shapes.py small classes out/shapes-classes
python tools/train_shapes.py small velocity out/shapes-velocity
models="--model shapes --model shapes-turbo --model out/shapes-classes --model out/shapes-velocity"
python tools/bench_verdict.py $models --compiled
python tools/bench_verdict.py $models --write-docs
```

What is finished is kept in `.bench-verdict/`; `--reuse` takes it although the code of qdexport has changed.
"""


def table_text(figures: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    found = {model: rows for model, rows in figures["models"].items() if any(map(_measured, rows.values()))}
    parts = [f"## `{model}`\n\n{_table(rows)}" for model, rows in found.items()]
    return "\n".join([*parts, _counts(figures)])


def write_docs(figures: Mapping[str, Any], settings: Settings, docs: Path) -> None:
    """Writes `verdicts.md`, `verdicts.json` and `pictures/verdicts.png`."""
    picture = docs / "pictures" / "verdicts.png"
    shown = _contact_sheet(figures, settings, picture)
    text = [_INTRODUCTION.format(seeds=len(figures["seeds"])), table_text(figures)]
    if shown:
        text.append(
            "![The first pictures of every recipe](pictures/verdicts.png)\n\nThe same prompts and noise in every line; "
            "behind each recipe its verdict and share.\n"
        )
    text.append(_REPEAT)
    write_json(docs / "verdicts.json", dict(figures))
    write_text(docs / "verdicts.md", "\n".join(text))


def _measured(row: Mapping[str, Any]) -> bool:
    return "pictures" in row or "compiled" in row


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["recipe", "image MSE", "share", "texture", "contrast", "kept", "margin", "same"]
    head += ["compiled right", "margin dB"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(_line(name, row) for name, row in rows.items())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _factors(results: list[Mapping[str, Any]]) -> list[str]:
    """The factors farthest from 1 of all seeds, of texture and of contrast."""
    found = [[item[key]["value"] for item in results if item.get(key)] for key in ("texture", "contrast")]
    return [f"{max(values, key=lambda value: max(value, 1 / value)):.2f}" if values else "" for values in found]


def _line(name: str, row: Mapping[str, Any]) -> list[str]:
    cells = [name]
    pictures, compiled = row.get("pictures"), row.get("compiled")
    if pictures is None:
        cells += [""] * 7
    else:
        verdicts = pictures["verdicts"]
        kept = verdicts.count("kept")
        wrong = row["must"] is not None and kept != (len(verdicts) if row["must"] else 0)
        share = "" if pictures["share"] is None else f"{pictures['share']:.3g}"
        margin = "" if pictures["least_margin"] is None else f"{pictures['least_margin']:.2f} x"
        same = "" if len(verdicts) == 1 else "yes" if len(set(verdicts)) == 1 else "no"
        counted = f"{kept} of {len(verdicts)}{' (!)' if wrong else ''}"
        cells += [f"{pictures['mse']:.2e}", share, *_factors(pictures["results"]), counted, margin, same]
    if compiled is None:
        return [*cells, "", ""]
    right = compiled["verdicts"].count("pass")
    return [*cells, f"{right} of {len(compiled['verdicts'])}", f"{compiled['least_margin']:.1f}"]


def _counts(figures: Mapping[str, Any]) -> str:
    """How many verdicts were those of most seeds of their recipe; a single seed says nothing."""
    lines = []
    for kind, name in (("pictures", "on pictures"), ("compiled", "on the compiled network")):
        for model, rows in figures["models"].items():
            found = [row[kind]["verdicts"] for row in rows.values() if kind in row and len(row[kind]["verdicts"]) > 1]
            total = sum(map(len, found))
            same = sum(max(verdicts.count(item) for item in set(verdicts)) for verdicts in found)
            if total:
                lines.append(f"- `{model}`: {same} of {total} verdicts {name} are the same over the seeds.")
    return "\n".join(lines) + "\n"


def _contact_sheet(figures: Mapping[str, Any], settings: Settings, path: Path) -> bool:
    """Pictures of every model side by side, a line for each recipe; False when there are none."""
    blocks = {model: list(_lines(figures, settings, model)) for model in settings.models}
    blocks = {model: lines for model, lines in blocks.items() if lines}
    if not blocks:
        return False
    height = max(map(len, blocks.values()))
    figure = Figure(figsize=(4.6 * len(blocks), 0.52 * height + 0.4), layout="constrained")
    for axes, (model, lines) in zip(np.atleast_1d(figure.subplots(1, len(blocks))), blocks.items(), strict=True):
        axes.imshow(np.concatenate([_strip(images) for _, _, images in lines]), interpolation="nearest")
        edge = lines[0][2].shape[-1]
        axes.set(xticks=[], title=model.rpartition("/")[2])
        middles = [edge * (number + 0.5) for number in range(len(lines))]
        axes.set_yticks(middles, [label for label, _, _ in lines], fontsize=8)
        for tick, (_, colour, _) in zip(axes.get_yticklabels(), lines, strict=True):
            tick.set_color(colour)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    return True


def _lines(
    figures: Mapping[str, Any], settings: Settings, model: str
) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
    """Label, colour and pictures of every line."""
    first = True
    rows = figures["models"][model.rpartition("/")[2]]
    for row in settings.rows:
        path = sheet_path(settings, model, row)
        if not path.is_file() or "pictures" not in rows[row.name]:
            continue
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            if first:
                yield "floating point", "black", arrays["fp"]
                if "other_seed" in arrays:
                    yield "another seed", "black", arrays["other_seed"]
            first = False
            found = rows[row.name]["pictures"]
            kept = found["verdicts"][0] == "kept"
            share = "" if found["share"] is None else f" {found['share']:.2g}"
            yield f"{row.name}: {found['verdicts'][0]}{share}", "#1a7f37" if kept else "#b42318", arrays["quantized"]


def _strip(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first pictures beside each other, ``[H, n W, 3]`` in [0, 1]."""
    shown = np.nan_to_num(np.clip((np.moveaxis(images[:_PICTURES], 1, -1) + 1) / 2, 0, 1))
    shown = np.repeat(shown, 3, axis=-1) if shown.shape[-1] == 1 else shown
    blank = np.ones((_PICTURES - len(shown), *shown.shape[1:]), shown.dtype)
    return np.concatenate([*shown, *blank], axis=1)
