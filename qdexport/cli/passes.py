"""``qdexport passes``: the compiler's passes, and what one of them says about itself."""

from __future__ import annotations

import difflib
import inspect as python_inspect
import sys

import click

from qdexport.cli.console import make_console, print_json, say

__all__ = ["passes"]


@click.command(
    epilog="""\b
Examples:
  qdexport passes                          all passes, in their order
  qdexport passes sequence-first           before, after, identity
  qdexport compile shapes --dump-passes graphs --explain conv_in
  qdexport compile shapes --pass my_pass.py:MyPass
"""
)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def passes(name: str | None, as_json: bool) -> None:
    """List the compiler's passes in the order in which they run, or explain the pass NAME.

    Text encoders and VAE decoders get those for floating point only; what runs for them alone is listed last.
    exact: every number stays, bit for bit. exact up to the order of sums: codes stay, and floating-point sums are the
    same but for their rounding, which depends on the processor's library anyway. exact up to roundings that fall away:
    a number is rounded less often. re-rounds: constants or scales are rounded again.
    """
    from qdexport.errors import RecipeError
    from qdexport.passes import DEFAULT_ORDER, FLOATING_POINT

    known = [*DEFAULT_ORDER, *(item for item in FLOATING_POINT if item not in DEFAULT_ORDER)]
    documents = {item.name: python_inspect.getdoc(sys.modules[item.__module__]) or "" for item in known}
    if name is not None:
        if name not in documents:
            near = difflib.get_close_matches(name, documents, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"no pass {name!r}{hint} (passes: {', '.join(documents)})")
        if as_json:
            print_json({"name": name, "text": documents[name]})
        else:
            say(documents[name])
        return
    rows = [
        {
            "name": item.name,
            "numbers": _numbers(item),
            "after": list(item.runs_after),
            "what": documents[item.name].splitlines()[0],
        }
        for item in known
    ]
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("pass", style="bold", no_wrap=True)
    table.add_column("numbers", max_width=24)
    table.add_column("what it does")
    for row in rows:
        table.add_row(str(row["name"]), str(row["numbers"]), str(row["what"]))
    make_console().print(table)


def _numbers(kind: type) -> str:
    if not getattr(kind, "exact", False):
        return "re-rounds"
    up_to = getattr(kind, "up_to", "")
    return f"exact up to {up_to}" if up_to else "exact"
