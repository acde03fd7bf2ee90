"""The machine-readable results: ``manifest.json`` and ``report.json`` (keys are documented in docs/results.md)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from qdexport.core.companion_facts import CompanionName
from qdexport.core.digests import digest_of_files, file_sha256, tree_files
from qdexport.core.files import write_json
from qdexport.core.paths import why_unsafe
from qdexport.core.reading import read_bytes, reading
from qdexport.errors import DamagedError, ModelError

__all__ = [
    "Artifact",
    "CompanionParity",
    "CompanionResult",
    "Cost",
    "CostSide",
    "Coverage",
    "EndToEnd",
    "EngineFacts",
    "Float64Parity",
    "KernelFact",
    "LayerError",
    "LayerErrors",
    "LayerParity",
    "Manifest",
    "Margin",
    "Parity",
    "Plan",
    "ProfileFacts",
    "Quality",
    "QualityScores",
    "Report",
    "ScaleRow",
    "ShapeParity",
    "StageFacts",
    "Verdict",
    "WeightStorage",
    "WholePipeline",
]

_T = TypeVar("_T", bound=BaseModel)
_CALIBRATION_THREADS = "calibration_threads"
ArtifactKind = Literal[
    "checkpoint", "onnx", "engine", "plan", "report", "images", "golden", "plugin", "log", "forms", "bit_plan",
    # of the networks beside the denoiser; a kind alone still names one thing of the denoiser
    "companion_onnx", "companion_engine", "companion_plan", "companion_golden",
]  # fmt: skip

# JSON has no infinity; identical tensors have infinite SQNR, written as 999 dB
_INFINITE_DB = 999.0
Decibel = Annotated[
    float, PlainSerializer(lambda v: -_INFINITE_DB if math.isnan(v) else max(-_INFINITE_DB, min(v, _INFINITE_DB)))
]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _below_root(name: str) -> str:
    reason = why_unsafe(name)
    if reason is not None:
        raise ValueError(f"{name!a}, {reason}; only what is below the output folder is used")
    return name


PathBelowRoot = Annotated[str, AfterValidator(_below_root)]


class Artifact(_Record):
    """One file or folder that a stage made; ``inputs`` are the digests it was made from. ``files`` are the files in a
    folder with their digests: what else is there is the user's.
    """

    kind: ArtifactKind
    path: PathBelowRoot
    sha256: str
    stage: str
    inputs: dict[str, str] = Field(default_factory=dict)
    files: dict[PathBelowRoot, str] | None = None

    @classmethod
    def of(
        cls,
        root: Path,
        path: Path,
        kind: ArtifactKind,
        stage: str,
        inputs: Mapping[str, str],
        ours: Collection[str] | None = None,
    ) -> Artifact:
        """Describes a finished file or folder below ``root``; ``ours`` names the files of a folder that count (all)."""
        files = None
        if path.is_dir():
            files = {name: sha256 for name, sha256 in tree_files(path).items() if ours is None or name in ours}
        return cls(
            kind=kind,
            path=path.relative_to(root).as_posix(),
            sha256=file_sha256(path) if files is None else digest_of_files(files),
            stage=stage,
            inputs=dict(inputs),
            files=files,
        )

    def digests(self) -> dict[str, str]:
        """The digest of every file, by its path relative to the output folder."""
        if self.files is None:
            return {self.path: self.sha256}
        return {f"{self.path}/{name}": sha256 for name, sha256 in self.files.items()}


class Manifest(_Record):
    """Everything in an output folder and where it came from.

    ``environment`` is that of the last run; ``calibration_threads`` is that of the checkpoint: the number of threads
    that it was calibrated with. ``profiles`` gives, by optimization profile and dynamic input, the smallest, usual and
    largest shape. ``claimed`` are files of ours that belong to no artifact: a stage was about to write them, or they
    are of an earlier run.
    """

    schema_version: Literal[1] = 1
    tool_version: str
    model: str
    recipe_digest: str
    target: str
    environment: dict[str, str] = Field(default_factory=dict)
    profiles: dict[str, dict[str, list[list[int]]]] = Field(default_factory=dict)
    artifacts: list[Artifact] = Field(default_factory=list)
    claimed: list[PathBelowRoot] = Field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes atomically."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a manifest. Raises ``ModelError`` when it is absent, ``DamagedError`` when it is not one of ours."""
        return _load(cls, path)

    def calibrated_with(self, threads: Sequence[int | str]) -> None:
        """Enters the numbers of threads of a new checkpoint, in their order; none when it was not calibrated."""
        self.environment.pop(_CALIBRATION_THREADS, None)
        if threads:
            self.environment[_CALIBRATION_THREADS] = ", then ".join(map(str, threads))

    def continues(self, earlier: Manifest) -> None:
        """Takes over what the artifacts of an earlier run were made with."""
        if _CALIBRATION_THREADS in earlier.environment:
            self.calibrated_with([earlier.environment[_CALIBRATION_THREADS]])

    def artifact(self, kind: ArtifactKind) -> Artifact | None:
        """The last artifact of a kind."""
        return next((item for item in reversed(self.artifacts) if item.kind == kind), None)


class Margin(_Record):
    """A measured value with its 95 % interval, beside the limit that it is held against."""

    value: float
    low: float
    high: float
    limit: float


class QualityScores(_Record):
    """Scores of one set of ``images``; ``frechet`` is to real images, ``frechet_fp`` to the FP model's images.

    ``share`` is the error as a share of what another seed makes, ``alignment_fall`` the loss of alignment, ``texture``
    the factor by which differences of neighbouring pixels change, ``contrast`` that of the pictures' deviation.
    """

    images: int | None = None
    not_finite: int = 0
    mse: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    frechet: float | None = None
    frechet_fp: float | None = None
    alignment: float | None = None
    share: Margin | None = None
    alignment_fall: Margin | None = None
    texture: Margin | None = None
    contrast: Margin | None = None


class Quality(_Record):
    """Images of the FP model against the quantized one: same prompts and seeds, values in [-1, 1], PSNR peak 2.

    ``other_seed`` are images of the FP model from other noise; ``not_judged`` says why nothing can be told from images.
    """

    images: int
    steps: int
    seed: int
    fp: QualityScores
    quantized: QualityScores
    onnx: QualityScores | None = None
    other_seed: QualityScores | None = None
    not_judged: str | None = None
    error_per_step: list[dict[str, float]] = Field(default_factory=list)


class WeightStorage(_Record):
    """The type that one weight is stored in: planned, found in the ONNX file, found in the compiled plan."""

    planned: str
    onnx: str
    engine: str | None = None


class ScaleRow(_Record):
    """A row of the tables of activation scales: the timestep that it was calibrated at, and the first and the last one
    that reads it, as the nearest.
    """

    timestep: float
    first: float
    last: float


class Coverage(_Record):
    """Compute type per layer: planned, found in the ONNX file, found in the compiled plan; ``storage`` has the layers
    whose weight alone is quantized, ``scale_rows`` nothing where activation scales are the same at every step.
    """

    planned: dict[str, str]
    onnx: dict[str, str]
    engine: dict[str, str] = Field(default_factory=dict)
    storage: dict[str, WeightStorage] = Field(default_factory=dict)
    bits: dict[str, list[int]] = Field(default_factory=dict)
    why: dict[str, str] = Field(default_factory=dict)
    notes: dict[str, str] = Field(default_factory=dict)
    scale_rows: list[ScaleRow] = Field(default_factory=list)
    macs_planned_share: float = 0.0
    average_weight_bits: float | None = None
    mismatches: list[str] = Field(default_factory=list)


class LayerParity(_Record):
    """One layer on identical inputs: the worst step. Flips are shares of differing integer codes: of the activations
    that the layer reads, and of its weight, where a single one is a failure. ``beyond_fp16`` is the largest number of a
    layer of an FP16 body that overflows.
    """

    name: str
    sqnr_db: Decibel
    code_flip_rate: float
    weight_flip_rate: float = 0.0
    steps: int = 0
    beyond_fp16: float | None = None


class EndToEnd(_Record):
    """One denoiser call, ONNX against fake-quant PyTorch, beside the floor that mere rounding sets."""

    sqnr_db: Decibel
    noise_floor_db: Decibel


class ShapeParity(_Record):
    """One shape of a network with dynamic dimensions: the worst of its layers, and one whole denoiser call.

    ``end`` says which end of the optimization profile it is, ``sizes`` the dynamic dimensions by name.
    """

    profile: str
    end: Literal["low", "best", "high"]
    sizes: dict[str, int]
    timestep: int
    layers: int
    sqnr_db: Decibel
    code_flip_rate: float
    whole_sqnr_db: Decibel
    noise_floor_db: Decibel
    problems: list[str] = Field(default_factory=list)


class Float64Parity(_Record):
    """File and fake-quant model in float64, where nothing but codes is rounded; ``rows`` counts by kind of table."""

    calls: int
    tensors: int
    sqnr_db: Decibel
    rows: dict[str, int] = Field(default_factory=dict)
    problems: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class Parity(_Record):
    """Compiler parity (tier 2); ``shapes`` is empty for fixed shapes, ``quick`` says that less was checked."""

    reference: str
    layers: list[LayerParity]
    end_to_end: EndToEnd
    float64: Float64Parity | None = None
    shapes: list[ShapeParity] = Field(default_factory=list)
    quick: bool = False
    verdict: Literal["pass", "fail"]
    reasons: list[str] = Field(default_factory=list)


class LayerError(_Record):
    """What quantizing one layer does to the denoiser's output: ``alone_db`` with everything else in floating point, and
    its ``share`` of the error that all quantized layers make together; ``own_db`` is that of the layer's own output.
    """

    name: str
    alone_db: Decibel
    own_db: Decibel
    share: float | None = None
    weight_share: float
    change: str
    advice: str


class LayerErrors(_Record):
    """The quantized layers by the error that they make, the largest first; ``explained`` is the sum of their shares."""

    method: Literal["first order", "local"]
    calls: int
    whole_db: Decibel
    explained: float | None = None
    layers: list[LayerError]


class CostSide(_Record):
    """One denoiser call: bytes of weights, bytes that kernels read and write, and the roofline's time: a bound."""

    weight_bytes: int
    moved_bytes: int
    microseconds: float


class Cost(_Record):
    """The weighted layers in FP16 and as quantized, both from their shapes; ``plan`` has all kernels of the engine."""

    gpu: str
    fp16: CostSide
    quantized: CostSide
    plan: CostSide | None = None


class KernelFact(_Record):
    """One entry of the compiled plan. ``modules`` are the torch module paths it came from, ``profile`` is the number of
    the optimization profile that it was made for.
    """

    index: int
    name: str
    kind: str
    inputs: list[str] = Field(default_factory=list)
    outputs: list[str] = Field(default_factory=list)
    tactic: str = ""
    nodes: list[str] = Field(default_factory=list)
    modules: list[str] = Field(default_factory=list)
    profile: int = 0


class Plan(_Record):
    """The kernel plan of an engine, read from the build log."""

    schema_version: Literal[1] = 1
    target: str
    kernels: list[KernelFact]

    def save(self, path: Path) -> None:
        """Writes atomically."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads a plan. Raises ``ModelError`` when it is absent, ``DamagedError`` when it is not one of ours."""
        return _load(cls, path)


class ProfileFacts(_Record):
    """One optimization profile: by input its smallest, usual and largest shape, and the kernels made for it."""

    name: str
    shapes: dict[str, list[list[int]]]
    kernels: int
    int8_compute: int
    fp_compute: int
    attention_kernels: int


class EngineFacts(_Record):
    """What the builder made; kernels are plan entries without stream signals and waits, of all profiles together."""

    target: str
    compute_capabilities: list[str]
    bytes: int
    kernels: int
    kernels_by_type: dict[str, int]
    int8_compute: int
    fp_compute: int
    attention_kernels: int
    build_seconds: float
    peak_rss_mb: float
    builder_version: str = ""
    kernels_fp_baseline: int | None = None
    fp8_compute: int = 0
    nvfp4_compute: int = 0
    profiles: list[ProfileFacts] = Field(default_factory=list)


class CompanionParity(_Record):
    """A network beside the denoiser: ONNX against PyTorch in FP32 on inputs of a sampling run, beside the floor.

    ``float64_left_out`` says why the two were not compared in float64; empty where they were.
    """

    reference: str
    calls: int
    sqnr_db: Decibel
    noise_floor_db: Decibel
    largest_activation: float
    float64_left_out: str = ""
    verdict: Literal["pass", "fail"]
    reasons: list[str] = Field(default_factory=list)


class CompanionResult(_Record):
    """A network beside the denoiser; ``layers`` counts its weighted layers by type, as planned and as read back."""

    class_name: str
    body: str
    why_body: str
    usage: str
    nodes: int
    onnx_bytes: int
    layers: dict[str, dict[str, int]] = Field(default_factory=dict)
    mismatches: list[str] = Field(default_factory=list)
    engine: EngineFacts | None = None
    parity: CompanionParity | None = None


class WholePipeline(_Record):
    """Images with all networks in ONNX against those with the denoiser alone in ONNX; PSNR with peak 2, medians."""

    networks: list[str]
    images: int
    steps: int
    psnr_db: Decibel
    noise_floor_db: Decibel
    verdict: Literal["pass", "fail"]
    reasons: list[str] = Field(default_factory=list)


class StageFacts(_Record):
    """Cost of one stage; a cached stage was found again by the digest of its inputs. ``notes`` are those of the
    report's that it made.
    """

    seconds: float
    peak_rss_mb: float
    cached: bool
    notes: list[str] = Field(default_factory=list)


class Verdict(_Record):
    """Whether the network is compiled right, and whether its pictures are kept; ``why`` in sentences."""

    compiled: Literal["pass", "fail", "not checked"]
    pictures: Literal["kept", "not kept", "not judged"]
    why: list[str]


class Report(_Record):
    """``report.json``; a key is present when its stage ran."""

    schema_version: Literal[1] = 1
    tool_version: str
    model: str
    recipe: str
    target: str
    body: str = ""
    verdict: Verdict | None = None
    quality: Quality | None = None
    coverage: Coverage | None = None
    parity: Parity | None = None
    layer_errors: LayerErrors | None = None
    cost: Cost | None = None
    engine: EngineFacts | None = None
    companions: dict[CompanionName, CompanionResult] | None = None
    whole_pipeline: WholePipeline | None = None
    stages: dict[str, StageFacts] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes atomically, without the keys of stages that did not run."""
        write_json(path, self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def load(cls, path: Path) -> Report:
        """Reads a report. Raises ``ModelError`` when it is absent, ``DamagedError`` when it is not one of ours."""
        return _load(cls, path)


_REMEDIES = {
    "Manifest": "run the `qdexport compile` or `quantize` that made this folder again: it makes a new one",
    "Report": "run the `qdexport compile` that made this folder again, or `qdexport validate` of the folder",
    "Plan": "run `qdexport build` of its folder again",
}


def _load(cls: type[_T], path: Path) -> _T:
    if not path.exists():
        raise ModelError(f"{path} does not exist; run `qdexport compile` first, or name another folder")
    remedy = _REMEDIES[cls.__name__]
    data = read_bytes(path, DamagedError, remedy)
    with reading(path, DamagedError, remedy, what=f"is not a {cls.__name__.lower()} file of qdexport"):
        return cls.model_validate_json(data)
