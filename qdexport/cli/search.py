"""``qdexport search``: the form of every operator, found by building blocks of the network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdexport.cli.compile import out_folder, prepared_options, run_stages
from qdexport.cli.console import make_console, print_json
from qdexport.cli.options import common, form_options, out_option, recipe_options, target_option, worker_options
from qdexport.core.owned import refuse_overwriting
from qdexport.errors import QdExportError

if TYPE_CHECKING:
    from qdexport.pipeline.compilation import Compilation
    from qdexport.pipeline.search import SearchFacts, WholeCost

__all__ = ["search", "show_search"]


@click.command(
    epilog="""\b
Examples:
  qdexport search shapes --out out                       calibrate, cut into blocks, build each form
  qdexport search ./my-sd --recipe w8a8 --allow-re-rounding --gpu rtx-3090
  qdexport search ./my-sd --write forms.json             keep the table
  qdexport compile ./my-sd --forms forms.json            use it, without a search
  qdexport compile ./my-sd --search                      search and compile at once
"""
)
@click.argument("model")
@recipe_options
@worker_options
@form_options
@target_option
@out_option
@click.option("--force", is_flag=True, help="Search from the start although nothing changed.")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Also write the table of forms here.")
@common
def search(model: str, **options: Any) -> None:
    """Find the form in which every operator of MODEL makes the cheapest kernels, and write OUT/search/.

    A block of the network (a resnet, a transformer) is built with an operator in each of its forms; the plan with the
    least predicted time wins (roofline, and a microsecond per kernel), then the fewest kernels, then the fewest bytes.
    A form that changes numbers never does. Equal blocks are built once, and an interrupted search goes on where it
    was. What was found is kept only if the plan of the whole network is not worse.
    """
    options["force"] = ("search",) if options["force"] else ()
    options["search"] = True
    if options["write"] is not None:
        refuse_overwriting(options["write"], _is_table)
    prepared = prepared_options(model, options)
    out = out_folder(prepared, options["out"])

    def stages(job: Compilation) -> None:
        job.check()
        job.quantize()
        job.search()

    run_stages(prepared, out, options, stages, show="nothing")
    _results(out, options)


def _is_table(path: Path) -> bool:
    from qdexport.core.forms import FormTable

    try:
        FormTable.load(path)
    except QdExportError:
        return False
    return True


def _results(out: Path, options: dict[str, Any]) -> None:
    from qdexport.pipeline.compilation import SEARCH_FOLDER
    from qdexport.pipeline.search import FORMS_FILE, SEARCH_FILE, SearchFacts

    folder = out / SEARCH_FOLDER
    facts = SearchFacts.load(folder / SEARCH_FILE)
    if options["write"] is not None:
        from qdexport.core.files import atomic_path

        with atomic_path(options["write"].resolve()) as partial:
            shutil.copyfile(folder / FORMS_FILE, partial)
    if options["as_json"]:
        print_json(facts.model_dump(mode="json", exclude_defaults=True))
    else:
        show_search(facts)


def show_search(facts: SearchFacts) -> None:
    """Prints every operator's forms with their costs, and the whole network before and after."""
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("operator", "shape", "form", "costs of its block, by form"):
        table.add_column(title)
    for entry in facts.entries:
        shape = ", ".join(f"{name} {value}" for name, value in entry.signature.items())
        table.add_row(entry.operator, shape, Text(entry.form, style="bold"), "\n".join(map(str, entry.tried)))
    console.print(table)
    console.print(
        f"{facts.blocks} blocks; {facts.built} answers were worked out, {facts.found_again} found again "
        f"({facts.target} {facts.builder}, {facts.gpu}; times are a bound, no measurement)"
    )
    kept = "kept" if facts.kept else "not kept: the whole network would be worse"
    console.print(f"whole network: {_words(facts.before)} before, {_words(facts.after)} with what was found ({kept})")


def _words(cost: WholeCost) -> str:
    return f"{cost.kernels} kernels, {cost.moved_bytes / 1e6:,.1f} MB, {cost.microseconds:,.1f} us"
