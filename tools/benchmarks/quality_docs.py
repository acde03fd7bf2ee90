"""Writes docs/quality.md and docs/quality.json from the figures of the quality table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["metric_text", "quality_markdown", "updated_figures"]

_TITLES: Final[Mapping[str, str]] = {
    "mse": "image MSE",
    "psnr_db": "PSNR dB",
    "ssim": "SSIM",
    "alignment": "alignment",
    "attributes": "attributes",
    "frechet_fp": "Frechet to FP",
    "frechet_real": "Frechet to real",
}
_MAIN: Final = ("mse", "psnr_db", "ssim", "frechet_fp", "alignment")
_INTRODUCTION: Final = """\
# Quality of the recipes on the bundled models

Everything on this page was written by `tools/bench_quality.py --write-docs`; `quality.json` beside it holds the same
figures by row. Each row samples the same prompts from the same noise. Intervals are 95 % bootstrap intervals over the
images.

- **image MSE** against the images of the floating-point model, on [-1, 1]; **PSNR** of that mean, peak 2; **SSIM**
  likewise.
- **Frechet to FP**: distance to the floating-point model's images, in the 64 features of the evaluator that comes with
  the model. It depends on the number of images: compare it only with rows of the same number.
- **alignment**: share of images that the evaluator reads exactly as the prompt says.
- **bits**: average width of weights (by their number) and of the values that layers read; a layer left in floating
  point counts with 16, layers that become a table of the timestep do not count.

*Naive* means symmetric min-max weights per output channel, asymmetric min-max activations per tensor, 32 calibration
prompts; `conv_in`, `conv_out` and the time embedding at W8A8. *MSE ranges* are the same with ranges of least squared
error instead of min-max. *Rows per step* have one activation range for each step of the sampler.
"""
_FRECHET_NOTE: Final = """\
The interval of a Frechet distance is that of resampled images, moved back by the shift that resampling alone makes (a
resampled set is less varied than the set it comes from).
"""


def quality_markdown(figures: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The page.

    Args:
        figures: of :class:`benchmarks.quality_table.Table`.
        pictures: path, relative to the page, and caption of each plot.
    """
    parts = [_INTRODUCTION, _settings(figures)]
    for model in dict.fromkeys(row["model"] for row in figures["rows"].values()):
        rows = [row for row in figures["rows"].values() if row["model"] == model]
        parts.append(_model_tables(model, rows))
    parts += [_comparisons(figures), _first_figures(figures["rows"]), _plots(pictures), _repeat(figures)]
    return "\n".join(part for part in parts if part)


def updated_figures(known: Mapping[str, Any], found: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """The figures of a page with those of some rows in their place.

    Args:
        known: of the page; its floating-point rows stay.
        found: of the rows that were measured again, over the same prompts.
        order: names of all rows.

    Returns:
        New rows stand where ``order`` has them. A comparison of a measured row is the new one, or none where the other
        row was not measured with it.
    """
    fresh = {name: row for name, row in found["rows"].items() if row["recipe_digest"] or name not in known["rows"]}
    rows = {**known["rows"], **fresh}
    made = {(pair["row"], pair["against"]): pair for pair in found["comparisons"]}
    kept = {
        (pair["row"], pair["against"]): pair
        for pair in known["comparisons"]
        if not {pair["row"], pair["against"]} & set(fresh)
    }
    return {
        **known,
        "rows": {name: rows[name] for name in sorted(rows, key=lambda name: _place(name, order))},
        "comparisons": [*kept.values(), *(pair for key, pair in made.items() if key not in kept)],
    }


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def metric_text(metric: str, value: float) -> str:
    """A number in the places that suit its metric."""
    if metric == "mse":
        return f"{value:.2e}"
    if metric == "psnr_db":
        return f"{value:.1f}"
    if metric.startswith("frechet"):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.4f}" if metric == "ssim" else f"{value:.3f}"


def _settings(figures: Mapping[str, Any]) -> str:
    settings = figures["settings"]
    sampled = "; ".join(
        f"`{model}`: {steps} steps, guidance scale {settings['guidance_scale'][model]:g}"
        for model, steps in settings["steps"].items()
    )
    return (
        f"{sampled}. Prompts are those of `prompts_for(model, ..., seed={settings['prompt_seed']})`; those among "
        f"the {settings['prompts_kept_out']}\nsentences that a calibration has seen give way to others of as many "
        "words. The noise of image i comes from seed i.\n"
        f"Real images: {settings['real_images']:,} renders.\n"
    )


def _model_tables(model: str, rows: Sequence[Mapping[str, Any]]) -> str:
    images = min(row["scores"]["alignment"]["images"] for row in rows if "alignment" in row["scores"])
    text = f"## `{model}`, {images} images\n\n" + _table(
        ["", "W bits", "A bits", *(_TITLES[metric] for metric in _MAIN)],
        [[row["title"], *_bits(row), *(_cell(row["scores"], metric) for metric in _MAIN)] for row in rows],
    )
    large = [row for row in rows if row["large"]]
    if not large:
        return text
    count = large[0]["large"]["alignment"]["images"]
    return (
        f"{text}\n### {count:,} images, against real ones\n\n"
        + _table(
            ["", _TITLES["frechet_real"], _TITLES["alignment"]],
            [
                [row["title"], *(_cell(row["large"], metric) for metric in ("frechet_real", "alignment"))]
                for row in large
            ],
        )
        + f"\n{_FRECHET_NOTE}"
    )


def _comparisons(figures: Mapping[str, Any]) -> str:
    rows = figures["rows"]
    lines = []
    for pair in figures["comparisons"]:
        first, second = rows[pair["row"]], rows[pair["against"]]
        for metric, difference in pair["differences"].items():
            label = f"{first['title']} minus {second['title']}"
            verdict = "yes" if difference["measurable"] else "no"
            ratio = _ratio(difference)
            lines.append(
                [label, _TITLES[metric], f"{difference['images']:,}", _interval(metric, difference), ratio, verdict]
            )
    if not lines:
        return ""
    text = (
        "## Paired differences\n\nThe same prompts and noise on both sides, resampled together. A difference is "
        "measurable when its interval does not hold 0.\n\n"
    )
    return text + _table(["", "metric", "images", "difference", "ratio", "measurable"], lines)


def _ratio(difference: Mapping[str, Any]) -> str:
    ratio = difference["ratio"]
    return "" if ratio is None else f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _first_figures(rows: Mapping[str, Any]) -> str:
    metrics = (
        ("mse", "image MSE"),
        ("psnr_image_db", "mean PSNR dB"),
        ("frechet_fp", "Frechet to FP"),
        ("alignment", "alignment"),
    )
    lines = [[row["title"], *(_beside(row, metric) for metric, _ in metrics)] for row in rows.values() if row["first"]]
    if not lines:
        return ""
    text = (
        "## Beside the figures measured when the model was made\n\nEach cell: this run / then. Then, calibration "
        "prompts, their noise, and the sample behind the ranges were others,\nand the PSNR was the mean over the "
        "images (which is larger than the PSNR of the mean error). An asterisk: outside this run's\ninterval.\n\n"
    )
    return text + _table(["", *(title for _, title in metrics)], lines)


def _beside(row: Mapping[str, Any], metric: str) -> str:
    then = row["first"].get(metric)
    if then is None:
        return ""
    if metric == "psnr_image_db":
        return f"{row['psnr_image_db']:.1f} / {then:.1f}"
    now = row["scores"].get(metric)
    if now is None:
        return f"- / {metric_text(metric, then)}"
    mark = "" if now["low"] <= then <= now["high"] else " *"
    return f"{metric_text(metric, now['value'])} / {metric_text(metric, then)}{mark}"


def _plots(pictures: Mapping[str, str]) -> str:
    if not pictures:
        return ""
    return "## Plots\n\n" + "\n".join(f"![{caption}]({path})\n\n{caption}.\n" for path, caption in pictures.items())


def _repeat(figures: Mapping[str, Any]) -> str:
    state = figures["machine"]
    seconds = sum(row.get("cpu_seconds", row.get("seconds", 0.0)) for row in figures["rows"].values())
    return f"""\
## To repeat it

```
python tools/bench_quality.py --list                    all rows
python tools/bench_quality.py --write-docs              measures what is missing, and writes this page
python tools/bench_quality.py --row 'mixdq-*' --json    some rows
```

Images are kept in `.bench-quality/`, so an interrupted run goes on where it was. They are made anew when a recipe, the
model or the code of qdexport changes; `--reuse` keeps them when only the code has. The rows took {seconds / 60:.0f}
minutes of one core ({state["processor"]}, {state["cores"]} cores).
"""


def _bits(row: Mapping[str, Any]) -> list[str]:
    if row.get("weight_bits") is None:
        return ["", ""]
    return [f"{row['weight_bits']:.2f}", f"{row['activation_bits']:.2f}"]


def _cell(scores: Mapping[str, Any], metric: str) -> str:
    return _interval(metric, scores[metric]) if metric in scores else ""


def _interval(metric: str, estimate: Mapping[str, float]) -> str:
    value, low, high = (metric_text(metric, estimate[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))
