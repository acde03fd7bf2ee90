"""``qdexport doctor``: what is installed, what this machine can do, and what to install next."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from qdexport.cli.console import make_console, print_json
from qdexport.errors import MissingDependencyError

if TYPE_CHECKING:
    from rich.console import Console

    from qdexport.core.diagnosis import Finding

__all__ = ["doctor"]

_MARKS = {"ok": ("ok", "green"), "warning": ("warn", "yellow"), "missing": ("no", "red")}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Say what this machine can do, and what to install next.

    Ends with code 0 when `qdexport compile` for the default target is possible here, with 9 otherwise.
    """
    from qdexport.core.diagnosis import DEFAULT_TARGET, can_compile, diagnose
    from qdexport.core.environment import environment_facts

    findings = diagnose()
    able = can_compile(findings)
    facts = environment_facts()
    if as_json:
        print_json(
            {
                "can_compile": able,
                "default_target": DEFAULT_TARGET,
                "findings": [dataclasses.asdict(item) for item in findings],
                "environment": facts,
            }
        )
    else:
        _show(make_console(), findings, facts)
    if not able:
        context.exit(MissingDependencyError.exit_code)


def _show(console: Console, findings: list[Finding], facts: dict[str, str]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    graphics = [value for key, value in facts.items() if key.startswith("gpu")] or ["no NVIDIA GPU"]
    machine = f"Python {facts['python']}, {facts['processor']}, {facts['cpu_count']} CPUs, {facts['ram_gib']} GiB"
    console.print(Text("; ".join([machine, *graphics])))
    console.print()
    table = Table.grid(padding=(0, 2, 0, 0), expand=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for item in findings:
        word, colour = _MARKS[item.status]
        lines = Text(item.detail)
        if item.advice:
            lines.append(f"\n-> {item.advice}", style="bold")
        table.add_row(Text(word, style=f"bold {colour}"), Text(item.name), lines)
    console.print(Padding(table, (0, 0, 0, 1)))
