"""What each target can do. Facts: NVIDIA's documentation and experiments with the TensorRT-RTX 1.7 builder."""

from __future__ import annotations

from dataclasses import dataclass

from qdexport.errors import RecipeError

__all__ = ["TARGETS", "Target", "target_named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One row of the capability table.

    Attributes:
        name: the name on the command line.
        opset: the ONNX opset the emitted file has.
        module: the Python module of the builder, or None when nothing is built.
        compute_capabilities: those that an engine can be built for; empty when the builder uses the GPU at hand.
        default_compute_capabilities: what is built when the recipe does not say.
        needs_gpu_to_build: whether a build needs the GPU itself.
        plugins: whether custom kernels can be used.
        int4_linear: whether INT4 weights of linear layers may be stored with INT8 compute.
        bodies: floating-point types of the rest of the network.
        merge_projections: whether one product of layers that read one tensor takes fewer kernels than its own merging.
    """

    name: str
    opset: int
    module: str | None
    compute_capabilities: tuple[str, ...]
    default_compute_capabilities: tuple[str, ...]
    needs_gpu_to_build: bool
    plugins: bool
    int4_linear: bool
    bodies: tuple[str, ...]
    merge_projections: bool = False


TARGETS: dict[str, Target] = {
    "tensorrt-rtx": Target(
        name="tensorrt-rtx",
        opset=21,
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
        module="tensorrt",
        compute_capabilities=(),
        default_compute_capabilities=(),
        needs_gpu_to_build=True,
        plugins=True,
        int4_linear=False,
        bodies=("fp32", "fp16"),
    ),
    "onnxruntime": Target(
        name="onnxruntime",
        opset=21,
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
