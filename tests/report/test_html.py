from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from qdexport.core.results import KernelFact, Plan, ProfileFacts, Report, ScaleRow
from qdexport.report.html import ReportInputs, write_html

if TYPE_CHECKING:
    from pathlib import Path

VOID = {"meta", "img", "wbr", "br", "input", "link", "hr"}
ATTACK = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>"


class Page(HTMLParser):
    """Collects what matters of a page, and checks that its elements are nested as written."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.unbalanced: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.unbalanced.extend(self._open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for attributes in self.all("section")]


def page_of(path: Path, inputs: ReportInputs) -> Page:
    write_html(path, inputs)
    return Page(path.read_text(encoding="utf-8"))


def test_page_has_every_section_and_is_well_nested(tmp_path: Path, inputs: ReportInputs) -> None:
    page = page_of(tmp_path / "report.html", inputs)
    assert page.unbalanced == []
    assert page.sections == [
        "images", "quality", "parity", "scales", "layers", "engine", "stages", "recipe", "environment",
    ]  # fmt: skip
    linked = {attributes["href"] for attributes in page.all("a")}
    assert linked == {f"#{name}" for name in page.sections}


def test_page_shows_the_facts(tmp_path: Path, inputs: ReportInputs) -> None:
    text = " ".join(" ".join(page_of(tmp_path / "report.html", inputs).texts).split())
    for fact in (
        "56 of 56",
        "42.8 dB",
        "71.4 dB",
        "14.3 MB",
        "0.984 → 0.984",
        "up_blocks. 0. resnets. 0. conv1",
    ):
        assert fact in text
    assert "no proof of speed" in text
    assert "only as weight-only" in text
    assert "build with full TensorRT (--target tensorrt)" in text
    assert "NaN" not in text
    assert "None" not in text


def test_profiles_have_a_table_of_their_shapes(tmp_path: Path, inputs: ReportInputs) -> None:
    assert inputs.report.engine is not None
    profiles = [
        ProfileFacts(
            name=name,
            shapes={"sample": [[1, 4, 8, 8], best, [2, 4, 16, 16]], "text": [[1, 7, 16], [2, 7, 16], [2, 7, 16]]},
            kernels=kernels,
            int8_compute=31,
            fp_compute=0,
            attention_kernels=3,
        )
        for name, best, kernels in (("small", [1, 4, 8, 8], 211), (ATTACK, [2, 4, 16, 16], 212))
    ]
    engine = inputs.report.engine.model_copy(update={"profiles": profiles})
    report = inputs.report.model_copy(update={"engine": engine})
    page = page_of(tmp_path / "report.html", dataclasses.replace(inputs, report=report))
    assert not page.unbalanced
    assert page.texts.count("2x4x16x16") == 3
    assert {"small", "211", "212", ATTACK} <= set(page.texts)


def test_page_is_self_contained(tmp_path: Path, inputs: ReportInputs) -> None:
    page = page_of(tmp_path / "report.html", inputs)
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:image/"))
    style = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?:", style)
    assert not page.all("link")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "script-src 'sha256-" in policy


def test_hostile_text_stays_text(tmp_path: Path, inputs: ReportInputs) -> None:
    report = inputs.report.model_copy(deep=True)
    assert report.coverage is not None
    assert report.parity is not None
    assert report.engine is not None
    report.model, report.recipe, report.body = ATTACK, ATTACK, ATTACK
    report.notes = [ATTACK]
    report.coverage.planned[ATTACK] = "int8"
    report.coverage.onnx[ATTACK] = report.coverage.engine[ATTACK] = ATTACK
    report.coverage.why[ATTACK] = ATTACK
    report.parity.layers[0].name = ATTACK
    report.parity.reference = ATTACK
    report.engine.kernels_by_type[ATTACK] = 1
    plan = Plan(target="t", kernels=[
        KernelFact(index=0, name=ATTACK, kind=ATTACK, inputs=[ATTACK], outputs=[ATTACK], modules=[ATTACK]),
    ])  # fmt: skip
    hostile = dataclasses.replace(
        inputs,
        report=report,
        plan=plan,
        recipe_yaml=ATTACK,
        prompts=[ATTACK] * len(inputs.prompts),
        scales={ATTACK: inputs.scales["conv_in"], **inputs.scales},
        environment={ATTACK: ATTACK},
    )
    calm, page = page_of(tmp_path / "calm.html", inputs), page_of(tmp_path / "hostile.html", hostile)
    assert page.unbalanced == []
    assert len(page.all("script")) == len(calm.all("script")) == 3
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert all((a["src"] or "").startswith("data:image/") for a in page.all("img"))
    assert sum(ATTACK in text for text in page.texts) > 10
    assert any(ATTACK in (a.get("alt") or "") for a in page.all("img"))


def test_a_page_without_any_stage(tmp_path: Path) -> None:
    bare = Report(tool_version="0.1.0", model="m", recipe="w8a8", target="onnxruntime")
    page = page_of(tmp_path / "report.html", ReportInputs(report=bare))
    assert page.unbalanced == []
    assert page.sections == []
    assert any("compiled: not checked" in text for text in page.texts)
    assert any("pictures: not judged" in text for text in page.texts)


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("quality", "quality"),
        ("coverage", "layers"),
        ("parity", "parity"),
        ("engine", "engine"),
        ("stages", "stages"),
    ],
)
def test_a_stage_that_did_not_run_has_no_section(
    tmp_path: Path, inputs: ReportInputs, key: str, section: str
) -> None:
    empty: object = {} if key == "stages" else None
    report = inputs.report.model_copy(update={key: empty})
    page = page_of(tmp_path / "report.html", dataclasses.replace(inputs, report=report))
    assert page.unbalanced == []
    whole = ["images", "quality", "parity", "scales", "layers", "engine", "stages", "recipe", "environment"]
    assert page.sections == [name for name in whole if name != section]


def test_without_pictures_the_grid_is_shown(tmp_path: Path, inputs: ReportInputs) -> None:
    grid = tmp_path / "grid.png"
    Image.fromarray(np.zeros((900, 600, 3), np.uint8)).save(grid)
    page = page_of(tmp_path / "report.html", dataclasses.replace(inputs, images={}, grid_png=grid))
    pictures = [a for a in page.all("img") if a.get("class") == "grid-image"]
    assert len(pictures) == 1
    assert page.sections[0] == "images"


def test_every_picture_has_a_text(tmp_path: Path, inputs: ReportInputs) -> None:
    page = page_of(tmp_path / "report.html", inputs)
    # 12 rows of FP, quantized, ONNX Runtime and their difference, and two heat maps
    assert len(page.all("img")) == 12 * 4 + 2
    assert all(a.get("alt") for a in page.all("img"))
    assert all(
        a.get("role") == "img" and a.get("aria-label")
        for a in page.all("svg")
        if "viewbox" in a and "role" in a
    )
    assert sum(a.get("role") == "img" for a in page.all("svg")) == 4


def test_the_nearest_step_is_told_beside_the_scales(tmp_path: Path, inputs: ReportInputs) -> None:
    assert inputs.report.coverage is not None
    inputs.report.coverage.scale_rows = [
        ScaleRow(timestep=901, first=452, last=999), ScaleRow(timestep=1, first=0, last=451)
    ]  # fmt: skip
    text = " ".join(page_of(tmp_path / "report.html", inputs).texts)
    assert "any other reads those of the nearest of them (452 to 999 those of 901)" in text
    assert "0 to 451: those of 1" in text


def test_static_scales_are_bars(tmp_path: Path, inputs: ReportInputs) -> None:
    static = {name: values[:1] for name, values in inputs.scales.items()}
    page = page_of(tmp_path / "report.html", dataclasses.replace(inputs, scales=static, timesteps=[]))
    assert "scales" in page.sections
    assert len(page.all("img")) == 12 * 4
    assert sum(a.get("data-tone") == "s0" for a in page.all("rect")) == len(static)


def test_scales_that_do_not_fit_the_timesteps_are_refused(tmp_path: Path, inputs: ReportInputs) -> None:
    scales = inputs.scales | {"conv_in": [0.1, 0.2]}
    with pytest.raises(ValueError, match="layer conv_in has 2 scales for 25 timesteps"):
        write_html(tmp_path / "report.html", dataclasses.replace(inputs, scales=scales))
    assert not (tmp_path / "report.html").exists()


def test_size_of_the_page(tmp_path: Path, inputs: ReportInputs) -> None:
    write_html(tmp_path / "report.html", inputs)
    # 36 random 32x32 pictures are 36 * 3 KiB of PNG that cannot shrink, 48 KiB more for their differences
    # (base64 adds a third); everything else is text
    assert (tmp_path / "report.html").stat().st_size < 600_000


def test_large_pictures_are_reduced(tmp_path: Path, inputs: ReportInputs) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (512, 512, 3), np.uint8)
    path = tmp_path / "large.png"
    Image.fromarray(noise).save(path)
    pictures = {"fp": [path] * 12, "quantized": [path] * 12}
    write_html(tmp_path / "report.html", dataclasses.replace(inputs, images=pictures))
    # noise is the worst case of JPEG: 24 thumbnails of 384x384 stay below a third of the PNG bytes
    assert (tmp_path / "report.html").stat().st_size < 24 * path.stat().st_size / 3


def test_a_failed_report_says_what_fell_short(
    tmp_path: Path, inputs: ReportInputs, layer_names: list[str]
) -> None:
    report = inputs.report.model_copy(deep=True)
    assert report.coverage is not None
    report.coverage.engine[layer_names[4]] = "fp16"
    report.coverage.mismatches = [f"{layer_names[4]}: planned int8, engine fp16"]
    page = page_of(tmp_path / "report.html", dataclasses.replace(inputs, report=report))
    assert [a for a in page.all("tr") if a.get("class") == "differs"] != []
    assert any(a.get("class") == "badge fail" for a in page.all("span"))
    assert sum(f"{layer_names[4]}: planned int8, engine fp16" in text for text in page.texts) == 2


def test_the_same_inputs_make_the_same_page(tmp_path: Path, inputs: ReportInputs) -> None:
    write_html(tmp_path / "a.html", inputs)
    write_html(tmp_path / "b.html", inputs)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_other_targets_have_no_rtx_caveat(tmp_path: Path, inputs: ReportInputs) -> None:
    report = inputs.report.model_copy(update={"target": "tensorrt"})
    text = " ".join(page_of(tmp_path / "report.html", dataclasses.replace(inputs, report=report)).texts)
    assert "weight-only" not in text
    assert "Nothing on this page was timed on a GPU" in text
