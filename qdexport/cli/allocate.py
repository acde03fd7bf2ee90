"""``qdexport sensitivity`` and ``qdexport allocate``: how much each layer matters, and how many bits it gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qdexport.cli.console import make_progress, print_json, say
from qdexport.cli.options import Number, common, overrides_of, ray_option, target_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdexport.pipeline.allocation import AllocationJob

__all__ = ["allocate", "sensitivity"]

_F = TypeVar("_F", bound="Callable[..., Any]")
_WORST_SHOWN = 5


def _sweep_options(function: _F) -> _F:
    for option in (
        ray_option("Measure on this Ray cluster (auto, host:6379; local starts one)."),
        click.option(
            "--workers", type=click.IntRange(1, 10_000),
            help="Processes on this machine, or on Ray the most tasks at once; default: one per core.",
        ),
        click.option(
            "--out", type=click.Path(file_okay=False, path_type=Path), required=True,
            help="Output folder; the same command continues there after an interruption.",
        ),
        click.option("--variant", help="Variant of the weight files, for example fp16."),
        click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE",
            help="Override a value of the recipe, for example --set bit_allocation.images=4.",
        ),
        click.option(
            "--recipe", default="w8a8-asym", show_default=True,
            help="A preset (see `qdexport recipes`) or a .yaml file.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


@click.command(
    epilog="""\b
Examples:
  qdexport sensitivity shapes --recipe mixdq-w4a8 --out sweep --workers 2
  qdexport sensitivity ./my-sd --recipe my.yaml --out sweep --ray auto
  qdexport sensitivity shapes --out sweep --set bit_allocation.quality_weight_bits=[3,4,8]
"""
)
@click.argument("model")
@_sweep_options
@common
def sensitivity(model: str, **options: Any) -> None:
    """Measure how sensitive MODEL is to each layer's weight and activation, at every width of the recipe.

    Writes sensitivity.json and sensitivity.png. One layer at a time is quantized: layers that carry the content of
    images (`bit_allocation.content`) are judged by the similarity of images, the others by the SQNR of the denoiser's
    output. Numbers do not depend on the number of workers.
    """
    import itertools
    from typing import get_args

    from qdexport.pipeline.allocation import write_sensitivity
    from qdexport.quant.sensitivity_table import Group, Part

    progress = make_progress(options["verbose"], options["as_json"])
    table = write_sensitivity(_job(model, options, "tensorrt-rtx", {}), progress)
    if options["as_json"]:
        print_json(table.model_dump(mode="json"))
        return
    for group, part in itertools.product(get_args(Group), get_args(Part)):
        entries = sorted(table.of(part, group), key=lambda entry: entry.values[min(entry.values)])
        if entries:
            say(f"most sensitive {group} layers, {part}s ({entries[0].metric}):")
        for entry in entries[:_WORST_SHOWN]:
            values = ", ".join(f"{bits} bits {value:.4g}" for bits, value in sorted(entry.values.items()))
            say(f"  {entry.name}: {values}")
    say(f"{options['out'] / 'sensitivity.json'} and .png hold all {len(table.entries)} measurements")


@click.command(
    epilog="""\b
Examples:
  qdexport allocate shapes --recipe mixdq-w4a8 --out plan --workers 2
  qdexport allocate shapes --recipe w8a8-asym --target-bits 4.0 --out plan
  qdexport allocate ./my-sd --recipe my.yaml --objective stored_bytes --target-bits 0.8 --out plan
  qdexport compile shapes --recipe w8a8-asym --set bit_plan=plan/bits.yaml --out out
"""
)
@click.argument("model")
@_sweep_options
@target_option
@click.option(
    "--target-bits", type=Number(0, 1e6, min_open=True), metavar="BITS",
    help="Average bits per weight (or, by the objective, a share of the bytes or the time at 8 bits).",
)  # fmt: skip
@click.option(
    "--activation-bits", type=Number(0, 1e6, min_open=True), metavar="BITS",
    help="Average bits per activation; default: the rules'.",
)  # fmt: skip
@click.option(
    "--objective", type=click.Choice(["average_bits", "stored_bytes", "predicted_time"]),
    help="What is held within the target; default: the recipe's.",
)  # fmt: skip
@common
def allocate(model: str, **options: Any) -> None:
    """Choose the width of every layer of MODEL by integer programming over measured sensitivities.

    Writes bits.yaml, which can be edited and named as `bit_plan` in a recipe, allocation.json and allocation.png with
    all plans of the scan, and the sensitivities; those of an earlier run in the same folder are used again.
    """
    from qdexport.pipeline.allocation import write_bit_plan

    changes = {
        "weight_target": options["target_bits"],
        "activation_target": options["activation_bits"],
        "objective": options["objective"],
    }
    given = {key: value for key, value in changes.items() if value is not None}
    progress = make_progress(options["verbose"], options["as_json"])
    plan = write_bit_plan(_job(model, options, options["target"], given), progress)
    path = options["out"] / "bits.yaml"
    if options["as_json"]:
        facts = {
            "average_weight_bits": plan.average_weight_bits,
            "average_activation_bits": plan.average_activation_bits,
        }
        print_json({"bits": str(path), "layers": len(plan.layers), **facts})
        return
    counts: dict[int, int] = {}
    for layer in plan.layers.values():
        counts[layer.weight] = counts.get(layer.weight, 0) + 1
    told = ", ".join(f"{count} at {bits}" for bits, count in sorted(counts.items()))
    say(f"weights: {plan.average_weight_bits:.3f} bits on average ({told})")
    say(f"activations: {plan.average_activation_bits:.3f} bits on average")
    say(f"{path} holds the widths of {len(plan.layers)} layers; compile with --set bit_plan={path}")


def _job(model: str, options: dict[str, Any], target: str, changes: dict[str, Any]) -> AllocationJob:
    from qdexport.core.recipe import load_recipe
    from qdexport.core.target import target_named
    from qdexport.pipeline.allocation import AllocationJob, with_allocation
    from qdexport.quant.tasks import usual_workers

    recipe = load_recipe(options["recipe"], overrides_of(options["assignments"], None))
    return AllocationJob(
        model=model,
        recipe=with_allocation(recipe, changes),
        target=target_named(target),
        out=options["out"],
        workers=usual_workers(options["workers"], options["ray"]),
        variant=options["variant"],
    )
