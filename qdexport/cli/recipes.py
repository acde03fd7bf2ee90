"""``qdexport recipes``: lists presets, shows one, or checks a file."""

from __future__ import annotations

import json

import click

__all__ = ["recipes"]


@click.command(
    epilog="""\b
Examples:
  qdexport recipes                 all presets
  qdexport recipes w8a8            its YAML with all defaults, to save and edit
  qdexport recipes my.yaml         check a file of your own
"""
)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipes(name: str | None, as_json: bool) -> None:
    """List the presets, or show the recipe NAME (a preset or a .yaml file) with all its defaults."""
    from qdexport.core.recipe import load_recipe, preset_names

    if name is not None:
        recipe = load_recipe(name)
        click.echo(recipe.model_dump_json(indent=2) if as_json else _comments(name) + recipe.to_yaml(), nl=as_json)
        return
    loaded = [load_recipe(preset) for preset in preset_names()]
    if as_json:
        click.echo(json.dumps({recipe.name: recipe.description for recipe in loaded}, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("what it does")
    for recipe in loaded:
        table.add_row(escape(recipe.name), escape(recipe.description))
    Console(highlight=False).print(table)


def _comments(name: str) -> str:
    """What a preset's file says about where it comes from; nothing for a file of the user's."""
    from qdexport.core.recipe import preset_names, preset_text

    lines = preset_text(name).splitlines(keepends=True) if name in preset_names() else []
    return "".join(line for line in lines if line.startswith("#"))
