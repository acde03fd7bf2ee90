"""Searches the forms of a network's operators block by block, and keeps them when the whole network is not worse."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from qdexport.core.cost_model import CARDS
from qdexport.core.files import write_json
from qdexport.core.forms import FormEntry, FormTable, shipped_forms
from qdexport.core.gpus import GPUS, Gpu, gpu_named
from qdexport.core.progress import SilentProgress
from qdexport.core.reading import read_record
from qdexport.errors import ModelError, RecipeError
from qdexport.graph.runner import run_passes
from qdexport.passes import default_passes
from qdexport.pipeline.lower import capture_network
from qdexport.search.blocks import cut_blocks
from qdexport.search.judge import BlockCost, BuilderJudge
from qdexport.search.results import AnswerCache
from qdexport.search.search import SearchSettings, as_exported, search_forms

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from qdexport.core.progress import ProgressSink
    from qdexport.core.target import Target
    from qdexport.pipeline.lower import Network
    from qdexport.quant.attach import QuantizedModel

__all__ = ["FORMS_FILE", "SEARCH_FILE", "SearchFacts", "gpu_to_search_on", "search_network"]

logger = logging.getLogger(__name__)

SEARCH_FILE, FORMS_FILE = "search.json", "forms.json"
_USUAL_GPU = "rtx-4090"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WholeCost(_Record):
    """The plan of the whole network: kernels, bytes moved per call, and its roofline time (a bound)."""

    kernels: int
    moved_bytes: int
    microseconds: float


class SearchFacts(_Record):
    """What a search found.

    Attributes:
        target: that was built for.
        gpu: whose rates judged.
        builder: version of the builder.
        blocks: of the network that have operators of several forms.
        built: plans that were built for blocks in this run; ``found_again`` came from earlier ones.
        before: the network with the table that the search started from.
        after: the network with what was found; equal to ``before`` where that is the same.
        kept: whether the network is written with what was found: only when it is not worse.
        entries: the form of every operator and what the others cost.
    """

    schema_version: Literal[1] = 1
    target: str
    gpu: str
    builder: str
    blocks: int
    built: int
    found_again: int
    before: WholeCost
    after: WholeCost
    kept: bool
    entries: list[FormEntry]

    def save(self, path: Path) -> None:
        """Writes atomically."""
        write_json(path, self.model_dump(mode="json", exclude_defaults=True))

    @classmethod
    def load(cls, path: Path) -> SearchFacts:
        """Reads the facts. Raises ``ModelError`` when the file is absent or not one of ours."""
        return read_record(cls, path, ModelError, "`qdexport search` writes it")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wholes:
    """Plans of the whole network, by the forms of its operators."""

    network: Network
    judge: BuilderJudge

    def cost(self, table: FormTable) -> BlockCost:
        return self.judge(_lowered(self.network, table))


def gpu_to_search_on(name: str | None, capabilities: Sequence[str] | None) -> Gpu:
    """The GPU whose rates judge: by name, else the card of the first compute capability of the recipe, else RTX 4090.

    Raises:
        RecipeError: the table does not have it.
    """
    if name is not None:
        return gpu_named(name)
    first = next(iter(capabilities or ()), None)
    if first is None:
        return gpu_named(_USUAL_GPU)
    if first not in CARDS:
        raise RecipeError(f"no rates are known for compute capability {first}; name a GPU: {', '.join(GPUS)}")
    return CARDS[first]


def search_network(  # noqa: PLR0913  one argument per source of facts
    model: QuantizedModel,
    target: Target,
    gpu: Gpu,
    folder: Path,
    cache: Path,
    *,
    start: FormTable | None = None,
    progress: ProgressSink | None = None,
) -> SearchFacts:
    """Finds the forms of all operators and writes ``folder/forms.json`` (a table) and ``folder/search.json``.

    Args:
        model: quantized, of fixed shapes.
        target: with a builder.
        gpu: is built for, and its rates judge.
        folder: for the results.
        cache: for the answers of the builder, so that an interrupted search goes on.
        start: the table to start from; None: the one that comes with qdexport.
        progress: where progress is shown.

    Raises:
        RecipeError: the target has no builder or does not build for the GPU, or a shape is dynamic.
        MissingDependencyError: the builder or onnxruntime is not installed.
        BuildError: the builder refuses a block, or the network.
    """
    progress = progress or SilentProgress()
    judge = BuilderJudge(target, gpu)
    network = capture_network(model, target)
    dynamic = [spec.name for spec in network.facts.io.inputs if any(dim.dynamic for dim in spec.dims)]
    if dynamic:
        raise RecipeError(f"a search compares plans of one fixed shape, and {dynamic[0]} is dynamic; search without")
    table = shipped_forms(target.name) if start is None else start
    blocks = cut_blocks(_lowered(network, as_exported(table)))
    answers = AnswerCache(cache)
    key = next(key for key, item in GPUS.items() if item is gpu)
    settings = SearchSettings(
        context=network.context,
        judge=judge,
        cache=answers,
        builder=judge.version,
        gpu=key,
        allow_re_rounding=model.recipe.allow_re_rounding,
    )
    entries = search_forms(blocks, table, settings, progress)
    count = len(blocks)
    del blocks  # their weights are those of a whole network
    found = table.with_entries(entries)
    before, after = _compared(_Wholes(network=network, judge=judge), table, found, progress)
    facts = SearchFacts(
        target=target.name,
        gpu=key,
        builder=judge.version,
        blocks=count,
        built=answers.stored,
        found_again=answers.found,
        before=_whole(before),
        after=_whole(after),
        kept=after.rank <= before.rank,
        entries=list(entries),
    )
    (found if facts.kept else table).save(folder / FORMS_FILE)
    facts.save(folder / SEARCH_FILE)
    return facts


def _compared(
    wholes: _Wholes, table: FormTable, found: FormTable, progress: ProgressSink
) -> tuple[BlockCost, BlockCost]:
    with progress.track(2, "search: the whole network") as advance:
        before = wholes.cost(table)
        advance(1, "as before")
        changed = any(
            table.choose(entry.operator, entry.signature, "").form != entry.form for entry in found.entries
        )
        after = wholes.cost(found) if changed else before
        advance(1, "with what was found")
    logger.info("whole network: %d kernels before, %d with the forms that were found", before.kernels, after.kernels)
    return before, after


def _lowered(network: Network, table: FormTable) -> ir.Model:
    model = network.model.clone()
    run_passes(model, default_passes(), replace(network.context, forms=table))
    return model


def _whole(cost: BlockCost) -> WholeCost:
    return WholeCost(
        kernels=cost.kernels, moved_bytes=cost.moved_bytes, microseconds=round(cost.seconds * 1e6, 1)
    )
