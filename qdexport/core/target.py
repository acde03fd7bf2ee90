"""What each target can do. Facts: NVIDIA's documentation and experiments with the TensorRT-RTX 1.7 builder."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qdexport.core.parsers import TENSORRT_10, TENSORRT_11, OnnxParser
from qdexport.errors import RecipeError

__all__ = ["INT4_OPSET", "TARGETS", "Target", "target_named"]

INT4_OPSET = 21  # the first with INT4 tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One row of the capability table.

    Attributes:
        name: the name on the command line.
        opset: the ONNX opset the emitted file has, unless the recipe asks for another one.
        opsets: the lowest and the highest that it may ask for.
        parser: what the builder's ONNX parser takes; None where ONNX itself is the only limit.
        builder_versions: of the builder's module, the oldest and the first that is too new (empty: any).
        module: the Python module of the builder, or None when nothing is built.
        compute_capabilities: those that an engine can be built for; empty when the builder uses the GPU at hand.
        default_compute_capabilities: what is built when the recipe does not say.
        needs_gpu_to_build: whether a build needs the GPU itself.
        plugins: whether custom kernels can be used.
        int4_linear: whether INT4 weights of linear layers may be stored with INT8 compute.
        bodies: floating-point types of the rest of the network.
        merge_projections: whether products that share an input are written as its fusions want them (passes
            merge-projections and bias-in-product).
    """

    name: str
    opset: int
    opsets: tuple[int, int]
    module: str | None
    compute_capabilities: tuple[str, ...]
    default_compute_capabilities: tuple[str, ...]
    needs_gpu_to_build: bool
    plugins: bool
    int4_linear: bool
    bodies: tuple[str, ...]
    merge_projections: bool = False
    parser: OnnxParser | None = None
    builder_versions: tuple[tuple[int, int] | tuple[()], tuple[int, int] | tuple[()]] = ((), ())

    def with_opset(self, opset: int | None) -> Target:
        """The same target with another opset; None keeps its own.

        INT4 tensors came with opset 21: below, narrow weights are stored as INT8.

        Raises:
            RecipeError: the target does not take this opset.
        """
        if opset is None or opset == self.opset:
            return self
        low, high = self.opsets
        if not low <= opset <= high:
            raise RecipeError(f"target {self.name} takes opset {low} to {high}, not {opset}; remove `opset`")
        return replace(self, opset=opset, int4_linear=self.int4_linear and opset >= INT4_OPSET)


TARGETS: dict[str, Target] = {
    "tensorrt-rtx": Target(
        name="tensorrt-rtx",
        opset=21,
        opsets=(20, 23),
        parser=TENSORRT_11,
        module="tensorrt_rtx",
        # SM 7.5 is left out on purpose: one engine that also holds it computes all INT8 convolutions in FP16
        compute_capabilities=("8.0", "8.6", "8.9", "12.0"),
        default_compute_capabilities=("8.6", "8.9", "12.0"),
        needs_gpu_to_build=False,
        plugins=False,
        int4_linear=True,
        bodies=("fp32", "fp16"),
        merge_projections=True,
    ),
    "tensorrt": Target(
        name="tensorrt",
        opset=21,
        opsets=(20, 23),
        parser=TENSORRT_11,
        builder_versions=((11, 0), ()),
        module="tensorrt",
        compute_capabilities=(),
        default_compute_capabilities=(),
        needs_gpu_to_build=True,
        plugins=True,
        int4_linear=False,
        bodies=("fp32", "fp16"),
    ),
    # Jetson Orin under JetPack 6, and every other TensorRT 10: the file is legal for 10.3, and for all that came later
    "tensorrt-10": Target(
        name="tensorrt-10",
        opset=20,
        opsets=(20, 20),
        parser=TENSORRT_10,
        builder_versions=((10, 3), (11, 0)),
        module="tensorrt",
        compute_capabilities=(),
        default_compute_capabilities=(),
        needs_gpu_to_build=True,
        # kernels that travel inside the engine came with 10.9
        plugins=False,
        int4_linear=False,
        bodies=("fp32", "fp16"),
    ),
    "onnxruntime": Target(
        name="onnxruntime",
        opset=21,
        opsets=(20, 23),
        module=None,
        compute_capabilities=(),
        default_compute_capabilities=(),
        needs_gpu_to_build=False,
        plugins=False,
        int4_linear=False,
        bodies=("fp32", "fp16"),
    ),
}


def target_named(name: str) -> Target:
    """Looks a target up.

    Raises:
        RecipeError: no target has this name.
    """
    target = TARGETS.get(name)
    if target is None:
        raise RecipeError(f"unknown target {name!r}; known targets: {', '.join(TARGETS)}")
    return target
