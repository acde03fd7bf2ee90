"""``qdexport recipes``: lists presets, shows one, or checks a file."""

from __future__ import annotations

import click

from qdexport.cli.console import make_console, print_json, say

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
        if as_json:
            print_json(recipe.model_dump(mode="json"))
        else:
            say(_comments(name) + recipe.to_yaml(), newline=False)
        return
    loaded = [load_recipe(preset) for preset in preset_names()]
    if as_json:
        print_json({recipe.name: recipe.description for recipe in loaded})
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("what it does")
    for recipe in loaded:
        table.add_row(recipe.name, recipe.description)
    make_console().print(table)


def _comments(name: str) -> str:
    """What a preset's file says about where it comes from; nothing for a file of the user's."""
    from qdexport.core.recipe import preset_names, preset_text

    lines = preset_text(name).splitlines(keepends=True) if name in preset_names() else []
    return "".join(line for line in lines if line.startswith("#"))
