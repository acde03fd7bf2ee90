"""The builder as the judge: what the kernel plan of a block costs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from qdexport.build.engine import BuildOptions, build_engine, require_builder
from qdexport.build.plan_cost import plan_cost
from qdexport.core.io_spec import IoSpec
from qdexport.core.writing import scratch_folder
from qdexport.emit.onnx_file import MODEL_FILE, emit
from qdexport.errors import BuildError, RecipeError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdexport.core.gpus import Gpu
    from qdexport.core.results import Plan
    from qdexport.core.target import Target

__all__ = ["LAUNCH_SECONDS", "BlockCost", "BuilderJudge", "Judge", "cost_of"]

# A kernel costs something however little it does: about a microsecond between two kernels of a CUDA graph on recent
# GPUs. A round number, so that neither a kernel with a large detour nor a byte more decides alone.
LAUNCH_SECONDS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """Costs of a kernel plan.

    Attributes:
        kernels: without stream signals and waits.
        moved_bytes: weights, and activations read and written.
        seconds: roofline time on one GPU, without launches.
    """

    kernels: int
    moved_bytes: int
    seconds: float

    @property
    def rank(self) -> tuple[float, int, int]:
        """The smaller the better: roofline time with one ``LAUNCH_SECONDS`` per kernel, then kernels, then bytes.

        Times count in steps of a hundredth of a microsecond: less is rounding.
        """
        seconds = self.seconds + self.kernels * LAUNCH_SECONDS
        return round(seconds * 1e8) / 1e8, self.kernels, self.moved_bytes


class Judge(Protocol):
    """Says what a model costs; ``identity`` names all that the answer depends on beside the model."""

    identity: str

    def __call__(self, model: ir.Model) -> BlockCost: ...


class BuilderJudge:
    """Builds a model for one GPU in the builder's own process.

    Args:
        target: has a builder that needs no GPU, or the GPU is this machine's.
        gpu: its compute capability is built for, its rates count.

    Raises:
        RecipeError: the target does not build for this GPU.
        MissingDependencyError: the builder is not installed.
    """

    def __init__(self, target: Target, gpu: Gpu) -> None:
        module = require_builder(target)
        if target.compute_capabilities and gpu.capability not in target.compute_capabilities:
            raise RecipeError(
                f"target {target.name} does not build for {gpu.name} (compute capability {gpu.capability}); choose a "
                f"GPU of {', '.join(target.compute_capabilities)}"
            )
        self.version = metadata.version(module.replace("_", "-"))
        self.identity = f"{module} {self.version}, compute capability {gpu.capability}, {gpu.name}"
        self._target, self._gpu = target, gpu

    def __call__(self, model: ir.Model) -> BlockCost:
        """Builds a copy of a lowered model of fixed shapes.

        Raises:
            BuildError: the builder refuses it.
        """
        with scratch_folder("qdexport-search-") as folder:
            emit(model.clone(), folder / "onnx", self._target, {})
            options = BuildOptions(
                target=self._target,
                io=IoSpec(inputs=(), outputs=()),
                compute_capabilities=(self._gpu.capability,) if self._target.compute_capabilities else (),
            )
            facts, plan = build_engine(folder / "onnx" / MODEL_FILE, folder / "engine", options)
            if facts.kernels == 0:
                raise BuildError("the builder made no kernel of this block")
            return cost_of(plan, facts.kernels, self._gpu)


def cost_of(plan: Plan, kernels: int, gpu: Gpu) -> BlockCost:
    """What a plan costs on a GPU.

    Raises:
        BuildError: a size of the plan is known only at run time.
    """
    cost = plan_cost(plan, gpu)
    return BlockCost(
        kernels=kernels, moved_bytes=round(cost.weight_bytes + cost.activation_bytes), seconds=cost.seconds
    )
