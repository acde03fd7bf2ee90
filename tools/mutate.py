"""Changes compiled files one thing at a time, and says which changes `validate` finds and names."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import onnx
import torch
from benchmarks.command import run_command
from benchmarks.fuzz import quantized_draw, refuses
from benchmarks.fuzz_draws import draw, without_blocks
from benchmarks.mutations import mutations

from qdexport.check.calls import check_calls, fit_inputs
from qdexport.check.float64.compare import distance
from qdexport.check.float64.graph import Float64Graph
from qdexport.check.float64.parity import float64_parity
from qdexport.check.parity import layer_parity
from qdexport.check.verdict import float64_problems, layer_problems
from qdexport.core.target import target_named
from qdexport.emit.facts import read_network_facts
from qdexport.emit.inspect import load_onnx
from qdexport.errors import QdExportError
from qdexport.models.sampling import DenoiserCall
from qdexport.passes import default_passes
from qdexport.pipeline.lower import capture_network, lower_network

if TYPE_CHECKING:
    from benchmarks.mutations import Mutation

    from qdexport.quant.attach import QuantizedModel

_EXAMPLES = """\b
Examples:
  python tools/mutate.py                              20 files, 40 changes each, 10 runs over each right file
  python tools/mutate.py --draws 200 --changes 0 --runs 1     right files alone
  python tools/mutate.py --first 3 --draws 1 --changes 100000   everything in one file
"""
_TARGET = "tensorrt-rtx"
_EQUAL = 1e-6  # of an element: what is less changes nothing in real arithmetic
_MISSED = 8


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--draws", default=20, show_default=True, type=click.IntRange(1), help="How many random models.")
@click.option("--first", default=0, show_default=True, help="Seed of the first; the others follow.")
@click.option("--changes", default=40, show_default=True, type=click.IntRange(0), help="At most so many per file.")
@click.option("--runs", default=10, show_default=True, type=click.IntRange(1), help="Checks of each right file.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path),
              help="Keep the right files here, and check those that are there instead of compiling them again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
def cli(
    draws: int, first: int, changes: int, runs: int, keep: Path | None, as_json: bool
) -> None:
    """Compile random models with random recipes, check each right file over several seeds of its calls, then change one
    thing of the file at a time (an element of each constant and of each row of each table, lookups, codes, epsilons,
    exchanged inputs, dropped nodes) and check again. A change that alters nothing in real arithmetic counts apart.
    """
    torch.set_num_threads(1)
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    missed: list[str] = []
    failed: list[str] = []
    right = 0
    for seed in range(first, first + draws):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="qdexport-mutate-") as folder:
            model, path = _compiled(seed, Path(folder) if keep is None else keep / str(seed))
            for run in range(runs):
                problems = _problems(model, path, run)
                right += 1
                failed += [f"seed {seed}, run {run}: {problem}" for problem in problems]
            _mutate(model, path, Path(folder), random.Random(seed), changes, seen, missed)
        total = sum(counts[key] for counts in seen.values() for key in ("found", "equivalent", "missed"))
        click.echo(f"seed {seed}: {right} right files, {len(failed)} failed; {total} changes, {len(missed)} missed, "
                   f"{time.perf_counter() - started:.0f} s", err=True)  # fmt: skip
    result = {"right": right, "failed": failed, "changes": {key: dict(value) for key, value in seen.items()},
              "missed": missed}  # fmt: skip
    click.echo(json.dumps(result) if as_json else _table(result))
    if failed or missed:
        sys.exit(_MISSED)


def _compiled(seed: int, folder: Path) -> tuple[QuantizedModel, Path]:
    case, target = draw(seed, small=True), target_named(_TARGET)
    model = quantized_draw(case)
    if refuses(target, model):
        model = quantized_draw(replace(case, recipe=without_blocks(case.recipe)))
    path = folder / "right" / "model.onnx"
    if not path.exists():
        path = lower_network(capture_network(model, target), model, path.parent, default_passes()).file.path
    return model, path


def _problems(model: QuantizedModel, path: Path, seed: int, *, calls: int = 3) -> list[str]:
    """What `validate` says about the file, pictures apart."""
    try:
        facts = read_network_facts(path)
        chosen = check_calls(model, facts.io, calls, seed)
        found = float64_problems(float64_parity(model, path, facts, chosen))
        return found or layer_problems(layer_parity(model, path, facts.io, chosen), model.body)
    except QdExportError as error:
        return [str(error)]


def _mutate(  # noqa: PLR0913  the last two are results
    model: QuantizedModel,
    path: Path,
    folder: Path,
    source: random.Random,
    count: int,
    seen: dict[str, Counter[str]],
    missed: list[str],
) -> None:
    proto = onnx.load(path)
    for item in _chosen(list(mutations(proto, source)), count, source):
        changed = onnx.ModelProto.FromString(proto.SerializeToString())
        item.edit(changed)
        other = folder / "changed.onnx"
        onnx.save(changed, other)
        problems = _problems(model, other, 0, calls=1)
        if problems:
            seen[item.kind]["found"] += 1
            seen[item.kind]["named"] += _names(item, problems)
        elif _equivalent(model, path, other):
            seen[item.kind]["equivalent"] += 1
        else:
            seen[item.kind]["missed"] += 1
            missed.append(f"{item.kind}: {item.what} ({', '.join(sorted(item.modules))})")


def _chosen(everything: list[Mutation], count: int, source: random.Random) -> list[Mutation]:
    """As many of each kind, as far as there are."""
    by_kind: dict[str, list[Mutation]] = defaultdict(list)
    for item in everything:
        by_kind[item.kind].append(item)
    for items in by_kind.values():
        source.shuffle(items)
    chosen: list[Mutation] = []
    while len(chosen) < count and any(by_kind.values()):
        chosen += [items.pop() for items in by_kind.values() if items]
    return chosen[:count]


def _names(item: Mutation, problems: list[str]) -> bool:
    """Whether a sentence holds a module of the change, its parent, or the row of a table."""
    text = " ".join(problems)
    places = {module.partition("#")[0].partition("+")[0] for module in item.modules}
    places |= {place.rpartition(".")[0] for place in places} - {""}
    return any(place in text for place in places) or " row " in text or "timestep" in text or "class" in text


def _equivalent(model: QuantizedModel, right: Path, changed: Path) -> bool:
    """Whether two files give the same prediction at every calibrated step, in float64."""
    facts = read_network_facts(right)
    graphs = [load_onnx(path) for path in (right, changed)]
    steps = model.timesteps or (999,)
    calls: list[DenoiserCall] = check_calls(model, facts.io, len(steps), 1)
    for call in calls:
        outputs = []
        for graph in graphs:
            run = Float64Graph(graph)
            run.start(fit_inputs(call.inputs, facts.io))
            outputs.append(run.value(run.outputs[0]))
        if distance(outputs[0], outputs[1]).worst > _EQUAL:
            return False
    return True


def _table(result: dict[str, Any]) -> str:
    lines = [f"right files: {result['right']} checks, {len(result['failed'])} failed"]
    lines += [f"{'change':20} {'made':>6} {'found':>6} {'named':>6} {'equivalent':>11} {'missed':>7}"]
    for kind, counts in sorted(result["changes"].items()):
        made = sum(counts.get(key, 0) for key in ("found", "equivalent", "missed"))
        row = [counts.get(key, 0) for key in ("found", "named", "equivalent", "missed")]
        lines.append(f"{kind:20} {made:6} {row[0]:6} {row[1]:6} {row[2]:11} {row[3]:7}")
    return "\n".join([*lines, *result["failed"], *(f"missed {item}" for item in result["missed"])])


if __name__ == "__main__":
    run_command(cli)
