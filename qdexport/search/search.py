"""Searches the form of every operator: each block is built in each form, the cheapest that keeps the numbers wins.

One operator after the other, in the order of the graph, the others in the form that they have by then. An operator
whose signature was decided in an earlier block keeps that decision, so that what repeats is searched once; a block that
was built before, in this run or in an earlier one, is not built again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qdexport.core.forms import FormEntry, FormTable, FormTrial, Signature
from qdexport.core.progress import SilentProgress
from qdexport.errors import BuildError, GraphPassError
from qdexport.graph.runner import PassContext, run_passes
from qdexport.passes import FORM_PASSES
from qdexport.passes.legalize_types import LegalizeTypes
from qdexport.search.blocks import Block, Site
from qdexport.search.judge import BlockCost, Judge
from qdexport.search.numbers import difference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from qdexport.core.progress import ProgressSink
    from qdexport.graph.runner import FormPass, GraphPass
    from qdexport.search.results import AnswerCache

__all__ = ["SearchSettings", "as_exported", "in_forms", "search_forms"]

logger = logging.getLogger(__name__)

_PASSES: dict[str, type[FormPass]] = {item.operator: item for item in FORM_PASSES}
Forms = dict[str, str]  # from the key of a site


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """What a search works with.

    Attributes:
        context: of the passes; its forms are those to start from.
        judge: says what a model costs.
        cache: answers of earlier searches.
        builder: version of the builder, for the record.
        gpu: key of the GPU whose rates the judge uses, for the record.
        compare: says why two forms of a block do not compute the same; empty when they do.
        allow_re_rounding: whether forms of passes that say `re-rounds` may be chosen.
    """

    context: PassContext
    judge: Judge
    cache: AnswerCache
    builder: str = ""
    gpu: str = ""
    compare: Callable[[ir.Model, ir.Model], str] = difference
    allow_re_rounding: bool = False


def as_exported(table: FormTable) -> FormTable:
    """A table that leaves every operator in the form of the export."""
    return table.forced({name: item.forms[0] for name, item in _PASSES.items()})


def search_forms(
    blocks: Sequence[Block], table: FormTable, settings: SearchSettings, progress: ProgressSink | None = None
) -> tuple[FormEntry, ...]:
    """The best form of every operator of some blocks.

    Args:
        blocks: cut from a network whose operators are in the form of the export.
        table: the forms to start from; a form replaces that of the table only when it is better.
        settings: judge, cache and what is allowed.
        progress: where progress is shown.

    Returns:
        One entry per signature, in the order in which they were found, each with the costs of all forms.

    Raises:
        BuildError: the builder refuses a block in every form.
        MissingDependencyError: onnxruntime, which compares numbers, is not installed.
    """
    found: dict[str, FormEntry] = {}
    with (progress or SilentProgress()).track(len(blocks), "search") as advance:
        for block in blocks:
            open_sites = [site for site in block.sites if site.key not in found]
            if open_sites:
                _BlockSearch(block, table.with_entries(tuple(found.values())), settings).run(open_sites, found)
            advance(1, block.name)
    return tuple(found.values())


def in_forms(block: Block, forms: Forms, context: PassContext) -> ir.Model:
    """A copy of a block with every operator in the form that is named for its site."""
    entries = tuple(
        FormEntry(operator=site.operator, signature=site.signature, form=forms[site.key]) for site in block.sites
    )
    model = block.model.clone()
    table = FormTable(target=context.target.name, entries=entries)
    passes: list[GraphPass] = [*(item() for item in FORM_PASSES), LegalizeTypes()]
    run_passes(model, passes, replace(context, forms=table))
    return model


@dataclass(slots=True)
class _BlockSearch:
    """The search of one block."""

    block: Block
    table: FormTable
    settings: SearchSettings
    forms: Forms = field(init=False)

    def __post_init__(self) -> None:
        self.forms = {site.key: self._start(site.operator, site.signature) for site in self.block.sites}

    def run(self, sites: Sequence[Site], found: dict[str, FormEntry]) -> None:
        """Decides these sites, one after the other."""
        if self._numbers(self.forms):  # those of the table would change numbers here
            self.forms = self._exported()
        for site in sites:
            found[site.key] = self._decided(site)

    def _start(self, operator: str, signature: Signature) -> str:
        return self.table.choose(operator, signature, _PASSES[operator].default).form

    def _exported(self) -> Forms:
        return {site.key: _PASSES[site.operator].forms[0] for site in self.block.sites}

    def _decided(self, site: Site) -> FormEntry:
        graph_pass = _PASSES[site.operator]
        now = self.forms[site.key]
        allowed = graph_pass.exact or self.settings.allow_re_rounding
        names = graph_pass.forms if allowed else (graph_pass.forms[0],)
        costs: dict[str, BlockCost] = {}
        why_not: dict[str, str] = {}
        for form in names:
            cost, reason = self._cost({**self.forms, site.key: form})
            if cost is None:
                why_not[form] = reason
            else:
                costs[form] = cost
        if not costs:
            reasons = "; ".join(f"{form}: {reason}" for form, reason in why_not.items())
            raise BuildError(f"the builder refuses block {self.block.name} in every form ({reasons})")
        # of equal costs the present form stays, then the first in the pass's list counts
        for form in sorted(costs, key=lambda name: (costs[name].rank, name != now, names.index(name))):
            reason = self._numbers({**self.forms, site.key: form})
            if not reason:
                self.forms[site.key] = form
                break
            why_not[form] = reason
        chosen = self.forms[site.key]
        logger.info("%s, %s %s: %s", self.block.name, site.operator, site.signature, chosen)
        return FormEntry(
            operator=site.operator,
            signature=site.signature,
            form=chosen,
            builder=self.settings.builder,
            gpu=self.settings.gpu,
            block=self.block.digest[:12],
            tried=tuple(_trial(form, costs.get(form), why_not.get(form, "")) for form in names),
        )

    def _cost(self, forms: Forms) -> tuple[BlockCost | None, str]:
        question = ("cost", self.settings.judge.identity, self.block.digest, forms)
        answer = self.settings.cache.get(*question)
        if answer is None:
            answer = self._built(forms)
            self.settings.cache.put(answer, *question)
        if "why_not" in answer:
            return None, str(answer["why_not"])
        return BlockCost(**answer), ""

    def _built(self, forms: Forms) -> dict[str, int | float | str]:
        try:
            cost = self.settings.judge(in_forms(self.block, forms, self.settings.context))
        except (BuildError, GraphPassError) as error:
            return {"why_not": str(error).splitlines()[0]}
        return {"kernels": cost.kernels, "moved_bytes": cost.moved_bytes, "seconds": cost.seconds}

    def _numbers(self, forms: Forms) -> str:
        exported = self._exported()
        if forms == exported:
            return ""
        question = ("equal", self.block.digest, forms)
        answer = self.settings.cache.get(*question)
        if answer is None:
            context = self.settings.context
            answer = {
                "why_not": self.settings.compare(
                    in_forms(self.block, exported, context), in_forms(self.block, forms, context)
                )
            }
            self.settings.cache.put(answer, *question)
        return str(answer["why_not"])


def _trial(form: str, cost: BlockCost | None, why_not: str) -> FormTrial:
    if cost is None:
        return FormTrial(form=form, why_not=why_not)
    return FormTrial(
        form=form,
        kernels=cost.kernels,
        moved_bytes=cost.moved_bytes,
        microseconds=round(cost.seconds * 1e6, 2),
        why_not=why_not,
    )
