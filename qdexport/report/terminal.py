"""The summary after a run: what a person needs in ten seconds, on any console of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qdexport.check.outcome import (
    compiled_problems,
    coverage_counts,
    narrow_name,
    picture_problems,
    storage_counts,
    verdict_of,
)
from qdexport.check.verdict import FLIP_LIMIT, FLOOR_MARGIN_DB
from qdexport.report import facts

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from qdexport.core.results import (
        CompanionResult,
        Coverage,
        EngineFacts,
        LayerError,
        Parity,
        ProfileFacts,
        Quality,
        Report,
        StageFacts,
        WholePipeline,
    )

__all__ = ["summary"]

_MOST_PROBLEMS = 6
_MOST_NOTES = 20
_MOST_LAYERS = 5
_GOOD, _BAD, _OPEN = "black on green", "white on red", "black on yellow"
_BADGES = {
    "pass": _GOOD, "fail": _BAD, "not checked": _OPEN,
    "kept": _GOOD, "not kept": _BAD, "not judged": _OPEN,
}  # fmt: skip


def summary(report: Report, console: Console, folder: Path | None = None) -> None:
    """Prints a report in a few lines; what fell short is red.

    Args:
        report: the machine-readable results; only the stages that ran are shown.
        console: where to print.
        folder: the output folder, to say where to look next when it holds a page.
    """
    body = f", {report.body} body" if report.body else ""
    head = Text.assemble((report.model, "bold"), f", {report.recipe}, {report.target}{body}")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in _lines(report):
        table.add_row(name, _plain(line, console))
    if folder is not None and (folder / "report.html").is_file():
        table.add_row("see", Text(str(folder / "report.html"), style="bold"))
    console.print()
    console.print(_plain(head, console))
    console.print(_verdicts(report, console))
    console.print()
    console.print(Padding(table, (0, 0, 0, 1)))
    console.print()


def _verdicts(report: Report, console: Console) -> Table:
    """A line for each verdict: its word, and the margin that it has."""
    verdict = verdict_of(report)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for word, told in (
        (verdict.compiled, f"compiled right: {facts.compiled_margin(report)}"),
        (verdict.pictures, f"pictures: {facts.pictures_margin(report)}"),
    ):
        table.add_row(Text(f" {word.upper()} ", style=f"bold {_BADGES[word]}"), _plain(Text(told), console))
    if report.parity is not None and report.parity.quick:
        table.add_row("", Text(facts.QUICK, style="yellow"))
    return table


def _lines(report: Report) -> list[tuple[str, Text]]:
    lines = []
    if report.coverage is not None:
        lines.extend(_coverage(report.coverage))
    if report.parity is not None:
        told = _parity(report.parity, facts.sqnr_limit(report))
        lines.extend(("" if index else "parity", line) for index, line in enumerate(told))
    if report.quality is not None:
        lines.append(("images", _images(report.quality)))
    if report.layer_errors is not None:
        told = [_layer_error(item) for item in report.layer_errors.layers[:_MOST_LAYERS]]
        lines.extend(("" if index else "error from", line) for index, line in enumerate(told))
    if report.cost is not None:
        lines.append(("layers cost", Text(f"{facts.cost_change(report.cost)} (FP16 → now; a bound)")))
    if report.engine is not None:
        weights_only = report.coverage is not None and bool(report.coverage.storage)
        lines.append(("engine", _engine(report.engine, weights_only=weights_only)))
        lines.extend(("", _profile(profile)) for profile in report.engine.profiles)
    lines.extend((name, _companion(result)) for name, result in (report.companions or {}).items())
    if report.whole_pipeline is not None:
        lines.append(("pipeline", _whole(report.whole_pipeline)))
    if report.stages:
        lines.append(("time", _times(report.stages)))
    return [*lines, *_remarks(report)]


def _remarks(report: Report) -> list[tuple[str, Text]]:
    """Notes, and what fell short."""
    lines = []
    if report.engine is not None and report.engine.int8_compute and report.target == "tensorrt-rtx":
        advice = "an INT8 kernel in an RTX plan is no proof of speed; for fast W8A8: --target tensorrt"
        lines.append(("note", Text(advice, style="yellow")))
    lines.extend(("note", Text(note, style="yellow")) for note in report.notes[:_MOST_NOTES])
    if len(report.notes) > _MOST_NOTES:
        lines.append(("", Text(f"and {len(report.notes) - _MOST_NOTES} more in report.json", style="yellow")))
    found = [*compiled_problems(report), *picture_problems(report)]
    lines.extend(
        ("short" if index == 0 else "", Text(item, style="bold red"))
        for index, item in enumerate(found[:_MOST_PROBLEMS])
    )
    if len(found) > _MOST_PROBLEMS:
        lines.append(("", Text(f"and {len(found) - _MOST_PROBLEMS} more in report.json", style="bold red")))
    return lines


def _coverage(coverage: Coverage) -> list[tuple[str, Text]]:
    lines = [("layers", _layers(coverage))]
    if coverage.scale_rows:
        lines.append(("steps", Text(facts.scale_rows(coverage))))
    if coverage.storage:
        lines.append(("weights", _weights(coverage)))
    return lines


def _layers(coverage: Coverage) -> Text:
    planned, onnx, engine = coverage_counts(coverage)
    counts = [
        ("planned", planned),
        ("in ONNX", onnx),
        *([("in the engine", engine)] if engine is not None else []),
    ]
    text = Text(f"{narrow_name(coverage.planned.values())}: ")
    for index, (where, count) in enumerate(counts):
        good = count == planned
        text.append(f"{', ' if index else ''}{count} {where}", style="" if good else "bold red")
    rest = len(coverage.planned) - planned
    if rest:
        text.append(f"; {rest} others ({facts.other_kinds(coverage)})")
    if coverage.average_weight_bits:
        text.append(f"; {coverage.average_weight_bits:.2f} bits per weight")
    return text


def _weights(coverage: Coverage) -> Text:
    count, good, types = storage_counts(coverage)
    text = Text(f"{types}: {count} layers whose weight alone is quantized, ")
    return text.append(f"{good} stored so", style="" if good == count else "bold red")


def _parity(parity: Parity, limit: float) -> list[Text]:
    flips, sqnr = facts.weakest(parity)
    lines = []
    if flips is not None and sqnr is not None:
        lines.append(
            Text(f"{facts.exact_layers(parity)} of {len(parity.layers)} layers with equal integer codes")
        )
        which, worst = facts.differing(flips)
        if worst:
            allowed = worst <= FLIP_LIMIT and flips.weight_flip_rate == 0
            lines.append(_worst(f"{which} differ", facts.rate(worst), flips.name, good=allowed))
        lines.append(_worst("least SQNR", facts.decibel(sqnr.sqnr_db), sqnr.name, good=sqnr.sqnr_db >= limit))
    whole = parity.end_to_end
    good = whole.sqnr_db >= whole.noise_floor_db - FLOOR_MARGIN_DB
    floor = f"(rounding alone {facts.decibel(whole.noise_floor_db)})"
    lines.append(_worst("end to end", facts.decibel(whole.sqnr_db), floor, good=good))
    if parity.shapes:
        weak = min(parity.shapes, key=lambda shape: shape.whole_sqnr_db - shape.noise_floor_db)
        sizes = ", ".join(f"{name} {size}" for name, size in weak.sizes.items())
        where = f"(rounding alone {facts.decibel(weak.noise_floor_db)}) at {sizes}"
        what = f"{len(parity.shapes)} shapes, worst"
        bad = any(shape.problems for shape in parity.shapes)
        lines.append(_worst(what, facts.decibel(weak.whole_sqnr_db), where, good=not bad))
    return lines


def _worst(what: str, value: str, where: str, *, good: bool) -> Text:
    return Text.assemble(f"{what} ", (value, "bold" if good else "bold red"), f" {where}")


def _layer_error(item: LayerError) -> Text:
    """One layer: how much of the error it makes, and what in the recipe helps."""
    return Text.assemble((facts.layer_error(item), "bold"), f" {item.name}: {item.change}")


def _images(quality: Quality) -> Text:
    base, scores = quality.fp, quality.quantized
    parts = []
    if base.alignment is not None and scores.alignment is not None:
        parts.append(f"alignment {base.alignment:.3f} → {scores.alignment:.3f}")
    if scores.psnr_db is not None:
        parts.append(f"PSNR {facts.decibel(scores.psnr_db)}")
    if scores.mse is not None:
        parts.append(f"MSE {facts.number(scores.mse)}")
    return Text(f"{', '.join(parts)} ({quality.images} images, {quality.steps} steps)")


def _engine(engine: EngineFacts, *, weights_only: bool) -> Text:
    text = Text(f"{engine.kernels} kernels: ")
    narrow, _, wide = facts.compute_counts(engine).partition(" and ")
    found = engine.int8_compute + engine.fp8_compute + engine.nvfp4_compute
    text.append(narrow, style="bold" if found or weights_only else "bold red")
    text.append(f" and {wide} convs and gemms, {engine.attention_kernels} attention; ")
    text.append(f"{facts.size(engine.bytes)}, built in {facts.duration(engine.build_seconds)}")
    if engine.compute_capabilities:
        text.append(f" for {', '.join(engine.compute_capabilities)}")
    return text


def _profile(profile: ProfileFacts) -> Text:
    """One optimization profile: its shapes, and the kernels that a call in it runs."""
    shapes = "; ".join(f"{name} {' '.join(map(_cross, ends))}" for name, ends in profile.shapes.items())
    return Text(
        f"profile {profile.name}: {profile.kernels} kernels, {profile.int8_compute} INT8 and {profile.fp_compute} FP; "
        f"{shapes}"
    )


def _cross(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _companion(result: CompanionResult) -> Text:
    """One line for a network beside the denoiser."""
    text = Text(f"{result.class_name} in {result.body}: ")
    if result.engine is not None:
        text.append(f"{result.engine.kernels} kernels, {facts.size(result.engine.bytes)}")
    else:
        text.append(f"{result.nodes} nodes, {facts.size(result.onnx_bytes)}")
    if result.parity is not None:
        good = result.parity.verdict == "pass"
        text.append("; ")
        text.append(facts.decibel(result.parity.sqnr_db), style="bold" if good else "bold red")
        text.append(f" (rounding alone {facts.decibel(result.parity.noise_floor_db)})")
    return text


def _whole(whole: WholePipeline) -> Text:
    """One line for images of all networks."""
    return Text.assemble(
        f"{whole.images} images with {', '.join(whole.networks)} in ONNX: ",
        (facts.decibel(whole.psnr_db), "bold" if whole.verdict == "pass" else "bold red"),
        f" (rounding alone {facts.decibel(whole.noise_floor_db)})",
    )


def _times(stages: dict[str, StageFacts]) -> Text:
    ran = [f"{name} {facts.duration(item.seconds)}" for name, item in stages.items() if not item.cached]
    cached = [name for name, item in stages.items() if item.cached]
    total = facts.duration(sum(item.seconds for item in stages.values() if not item.cached))
    parts = [f"{total} ({', '.join(ran)})"] if ran else []
    if cached:
        parts.append(f"found again: {', '.join(cached)}")
    return Text("; ".join(parts))


def _plain(text: Text, console: Console) -> Text:
    """Without the arrow where the console cannot show it."""
    if console.options.ascii_only:
        pieces = text.split("→")
        return Text("->").join(pieces)
    return text
