"""Two verdicts, read off a report alone: what each says at, above and below its limits."""

from __future__ import annotations

import pytest

from qdexport.check.outcome import failed, picture_problems, verdict_of
from qdexport.core.results import Coverage, EndToEnd, LayerParity, Margin, Parity, Quality, QualityScores, Report


def report_of(
    share: tuple[float, float, float] = (0.1, 0.05, 0.2), fall: tuple[float, float, float] | None = None,
    *, others: int = 32, onnx: tuple[float, float, float] | None = None, **changes: object,
) -> Report:  # fmt: skip
    def scores(numbers: tuple[float, float, float], lost: tuple[float, float, float] | None) -> QualityScores:
        return QualityScores(
            images=32, mse=1e-3, share=margin(numbers, 0.5), alignment_fall=None if lost is None else margin(lost, 0.03)
        )

    quality = Quality(
        images=32, steps=4, seed=0, fp=QualityScores(images=32), quantized=scores(share, fall),
        onnx=None if onnx is None else scores(onnx, None), other_seed=QualityScores(images=others, mse=1e-2),
    )  # fmt: skip
    parity = Parity(
        reference="r", layers=[LayerParity(name="conv_in", sqnr_db=130, code_flip_rate=0)],
        end_to_end=EndToEnd(sqnr_db=70, noise_floor_db=70), verdict="pass",
    )  # fmt: skip
    columns = {"planned": {"conv_in": "int8"}, "onnx": {"conv_in": "int8"}}
    report = Report(tool_version="0", model="m", recipe="r", target="onnxruntime", parity=parity, quality=quality)
    report.coverage = Coverage(**columns)
    return report.model_copy(update={"quality": quality.model_copy(update=changes)})


def margin(numbers: tuple[float, float, float], limit: float) -> Margin:
    value, low, high = numbers
    return Margin(value=value, low=low, high=high, limit=limit)


@pytest.mark.parametrize(
    ("share", "others", "word"),
    [
        ((0.1, 0.05, 0.2), 32, "kept"),
        ((0.4, 0.3, 0.5), 32, "kept"),  # the limit itself is allowed
        ((0.4, 0.3, 0.51), 32, "not kept"),  # the upper end counts
        ((4.0, 3.0, 5.0), 32, "not kept"),
        ((float("nan"),) * 3, 32, "not kept"),
        ((0.1, 0.05, 0.2), 8, "kept"),
        ((0.4, 0.3, 0.51), 8, "not judged"),  # so few pictures tell only what is far from the limit
        ((4.0, 3.0, 5.0), 8, "not kept"),
    ],
)
def test_the_share_of_another_seeds_error(share: tuple[float, float, float], others: int, word: str) -> None:
    report = report_of(share, others=others)
    verdict = verdict_of(report)
    assert (verdict.compiled, verdict.pictures) == ("pass", word)
    assert failed(report) == (word == "not kept")
    assert bool(picture_problems(report)) == (word == "not kept")


@pytest.mark.parametrize(
    ("fall", "word"),
    [
        ((0.0, -0.05, 0.05), "kept"),
        ((0.031, -0.05, 0.11), "kept"),  # one picture of 32, which chance explains
        ((0.16, 0.02, 0.28), "not kept"),
        ((0.02, 0.016, 0.03), "kept"),  # it does fall, by less than is asked
        ((0.043, 0.009, 0.077), "kept"),  # 11 of 256, where the truth may be a third of that
        ((0.03, 0.016, 0.05), "not kept"),
        ((-0.2, -0.3, -0.1), "kept"),
    ],
)
def test_the_fall_of_alignment(fall: tuple[float, float, float], word: str) -> None:
    assert verdict_of(report_of(fall=fall)).pictures == word


def test_the_file_is_judged_too() -> None:
    verdict = verdict_of(report_of(onnx=(0.6, 0.55, 0.7)))
    assert verdict.pictures == "not kept"
    assert verdict.why[-1].startswith("The pictures of the ONNX file are not those of the floating-point model")


def test_what_is_not_finite_is_not_kept() -> None:
    report = report_of()
    assert report.quality is not None
    report.quality.quantized = QualityScores(images=32, not_finite=3)
    assert verdict_of(report).pictures == "not kept"
    assert verdict_of(report).why[-1] == "3 pictures of the quantized model hold values that are not finite."


def test_a_reason_not_to_judge_comes_first() -> None:
    report = report_of((4.0, 3.0, 5.0), not_judged="Noise.")
    assert verdict_of(report).pictures == "not judged"
    assert verdict_of(report).why[-1] == "Noise."
    assert not failed(report)


def test_no_pictures_no_verdict_on_them() -> None:
    report = report_of()
    report.quality = None
    assert verdict_of(report).why[-1] == "No pictures were compared: the model came without a pipeline."
    report.parity = None
    verdict = verdict_of(report)
    assert (verdict.compiled, verdict.pictures) == ("not checked", "not judged")
    assert verdict.why[-1] == "No pictures were compared: the check stage has not run."
    assert not failed(report)


def test_a_report_of_an_older_run_says_what_to_do() -> None:
    report = report_of()
    assert report.quality is not None
    report.quality.quantized = QualityScores(mse=1e-3)
    assert verdict_of(report).pictures == "not judged"
    assert "qdexport validate" in verdict_of(report).why[-1]


def test_good_pictures_of_a_wrong_file_fail() -> None:
    report = report_of()
    assert report.parity is not None
    report.parity.verdict, report.parity.reasons = "fail", ["codes differ"]
    verdict = verdict_of(report)
    assert (verdict.compiled, verdict.pictures, verdict.why[0]) == ("fail", "kept", "codes differ")
    assert failed(report)


@pytest.mark.parametrize(
    ("texture", "others", "word"),
    [
        ((1.2, 1.1, 1.3), 32, ""),
        ((1.3, 1.2, 1.4), 32, "noisier"),
        ((0.7, 0.6, 0.8), 32, "smoother"),
        ((1.4, 1.05, 1.8), 32, ""),  # by chance
        ((1.3, 1.2, 1.4), 8, ""),  # of few pictures the whole interval counts
        ((0.5, 0.4, 0.6), 8, "smoother"),
    ],
)
def test_noise_and_lost_contrast_are_not_kept(texture: tuple[float, float, float], others: int, word: str) -> None:
    report = report_of(others=others)
    assert report.quality is not None
    report.quality.quantized.texture = margin(texture, 1.25)
    other = report.model_copy(deep=True)
    verdict = verdict_of(report)
    assert verdict.pictures == ("not kept" if word else "kept")
    assert word in " ".join(verdict.why)
    assert "neighbouring pixels differ" in " ".join(verdict.why).lower()
    assert other.quality is not None
    other.quality.quantized.texture, other.quality.quantized.contrast = None, margin(texture, 1.25)
    assert verdict_of(other).pictures == verdict.pictures
    assert "contrast" in " ".join(verdict_of(other).why).lower()
