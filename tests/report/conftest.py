"""A made-up but realistic report: 62 layers, 25 step rows, small random pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from qdexport.core.results import (
    Coverage,
    EndToEnd,
    EngineFacts,
    KernelFact,
    LayerParity,
    Margin,
    Parity,
    Plan,
    Quality,
    QualityScores,
    Report,
    StageFacts,
)
from qdexport.report.html import ReportInputs

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = 62
STEPS = 25
IMAGES = 12
SEED = 7

_BLOCKS = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
_PARTS = (
    "resnets.0.conv1",
    "resnets.0.time_emb_proj",
    "resnets.0.conv2",
    "attentions.0.proj_in",
    "attentions.0.transformer_blocks.0.attn1.to_q",
    "attentions.0.transformer_blocks.0.attn1.to_out.0",
    "attentions.0.transformer_blocks.0.attn2.to_q",
    "attentions.0.transformer_blocks.0.attn2.to_k",
    "attentions.0.transformer_blocks.0.attn2.to_out.0",
    "attentions.0.transformer_blocks.0.ff.net.0.proj",
    "attentions.0.transformer_blocks.0.ff.net.2",
    "attentions.0.proj_out",
)


@pytest.fixture
def layer_names() -> list[str]:
    middle = [f"{block}.{part}" for block in _BLOCKS for part in _PARTS]
    return ["conv_in", *middle[: LAYERS - 2], "conv_out"]


@pytest.fixture
def report(layer_names: list[str]) -> Report:
    """A report of a run in which everything passed."""
    noise = np.random.default_rng(SEED)
    planned = dict.fromkeys(layer_names, "int8")
    planned |= {name: "folded" for name in layer_names if name.endswith("time_emb_proj")}
    planned["conv_out"] = "fp32"
    quantized = [name for name in layer_names if planned[name] == "int8"]
    flips = np.where(noise.random(len(quantized)) < 0.2, noise.random(len(quantized)) * 4e-5, 0.0)
    layers = [
        LayerParity(
            name=name, sqnr_db=float(132 + 6 * noise.standard_normal()), code_flip_rate=float(flip), steps=3
        )
        for name, flip in zip(quantized, flips, strict=True)
    ]
    layers[3].sqnr_db = float("inf")
    errors = np.geomspace(2e-6, 3e-4, STEPS) * np.exp(0.15 * noise.standard_normal(STEPS))
    return Report(
        tool_version="0.1.0",
        model="shapes-sd",
        recipe="w8a8-timestep",
        target="tensorrt-rtx",
        body="fp32",
        quality=Quality(
            images=64,
            steps=STEPS,
            seed=0,
            fp=QualityScores(images=64, alignment=0.984, frechet=241.2),
            quantized=QualityScores(
                images=64, mse=3.1e-4, psnr_db=42.8, ssim=0.9941, alignment=0.984, frechet=240.7, frechet_fp=0.91,
                share=Margin(value=0.022, low=0.017, high=0.029, limit=0.5),
                alignment_fall=Margin(value=0.0, low=-0.03, high=0.03, limit=0.03),
            ),
            onnx=QualityScores(images=64, mse=3.1e-4, psnr_db=42.8, ssim=0.9941, alignment=0.984, frechet_fp=0.91),
            other_seed=QualityScores(images=16, mse=1.9e-2, psnr_db=23.3, ssim=0.85, alignment=1.0),
            error_per_step=[
                {
                    "step": step,
                    "timestep": 961 - 40 * step,
                    "latent_mse": float(errors[step]),
                    "prediction_mse": float(errors[step] * (3 - step / 12)),
                    "prediction_sqnr_db": float(-10 * np.log10(errors[step])),
                }
                for step in range(STEPS)
            ],
        ),
        coverage=Coverage(
            planned=planned,
            onnx=dict(planned),
            engine=dict(planned),
            bits={name: [8, 8] for name in quantized},
            why={
                name: "rule 0: *" if planned[name] == "int8" else "depends on the timestep alone"
                for name in planned
            },
            macs_planned_share=0.987,
        ),
        parity=Parity(
            reference="ONNX Runtime 1.31.1 at ORT_ENABLE_BASIC",
            layers=layers,
            end_to_end=EndToEnd(sqnr_db=71.4, noise_floor_db=70.2),
            verdict="pass",
        ),
        engine=EngineFacts(
            target="tensorrt-rtx",
            compute_capabilities=["8.6", "8.9", "12.0"],
            bytes=14_300_000,
            kernels=214,
            kernels_by_type={"kgen": 118, "gemm": 48, "correlation": 27, "runtime_fusion": 12, "copy": 9},
            int8_compute=56,
            fp_compute=1,
            attention_kernels=12,
            build_seconds=38.4,
            peak_rss_mb=2310.0,
            builder_version="1.7.1.116",
            kernels_fp_baseline=209,
        ),
        stages={
            "quantize": StageFacts(seconds=24.1, peak_rss_mb=1210.0, cached=False),
            "export": StageFacts(seconds=9.3, peak_rss_mb=1544.0, cached=False),
            "emit": StageFacts(seconds=0.8, peak_rss_mb=1544.0, cached=False),
            "build": StageFacts(seconds=38.4, peak_rss_mb=2310.0, cached=False),
            "check": StageFacts(seconds=51.7, peak_rss_mb=2012.0, cached=True),
        },
        notes=["timestep 1000 has no step row; the nearest calibrated step, 961, is used"],
    )


@pytest.fixture
def plan(layer_names: list[str]) -> Plan:
    kernels = []
    for index, name in enumerate(layer_names):
        kind = "correlation" if "conv" in name else "gemm"
        for offset, (kernel, made) in enumerate(
            [(f"__myl_MulMinMaxRounCast_myl0_{3 * index}", "kgen"), (kind, kind)]
        ):
            kernels.append(
                KernelFact(
                    index=3 * index + offset,
                    name=f"{kernel}_{index}",
                    kind=made,
                    inputs=["t0 Float[2,64,8,8]"],
                    outputs=["t1 Int8[2,64,8,8]"],
                    nodes=[f"{name}/Conv"],
                    modules=[name],
                )
            )
    return Plan(target="tensorrt-rtx", kernels=kernels)


@pytest.fixture
def images(tmp_path: Path) -> dict[str, list[Path]]:
    noise = np.random.default_rng(SEED)
    columns: dict[str, list[Path]] = {}
    for index in range(IMAGES):
        base = noise.integers(0, 255, (32, 32, 3))
        for column in ("fp", "quantized", "onnx"):
            pixels = base if column == "fp" else np.clip(base + noise.integers(-3, 4, base.shape), 0, 255)
            path = tmp_path / "images" / column / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            columns.setdefault(column, []).append(path)
    return columns


@pytest.fixture
def inputs(report: Report, plan: Plan, images: dict[str, list[Path]]) -> ReportInputs:
    """Everything a page can show."""
    noise = np.random.default_rng(SEED)
    narrow = (
        [name for name, kind in report.coverage.planned.items() if kind == "int8"] if report.coverage else []
    )
    scales = {}
    for name in narrow:
        level, drift = 10 ** noise.uniform(-2.3, -0.7), noise.uniform(-1.2, 1.2)
        wave = np.exp(drift * np.linspace(-0.5, 0.5, STEPS) + 0.05 * noise.standard_normal(STEPS))
        scales[name] = [float(value) for value in level * wave]
    return ReportInputs(
        report=report,
        recipe_yaml="schema_version: 1\nname: w8a8-timestep\nrules:\n- match: '*'\n  weight: {bits: 8}\n",
        images=images,
        prompts=[f"a red circle left of a blue square, number {index}" for index in range(IMAGES)],
        scales=scales,
        timesteps=[961 - 40 * step for step in range(STEPS)],
        plan=plan,
        environment={
            "python": "3.11.7",
            "onnxruntime": "1.31.1",
            "tensorrt-rtx": "1.7.1.116",
            "cpu_count": "2",
        },
    )
