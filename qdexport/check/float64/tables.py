"""Tables of the ONNX file against the fake-quant model: every row, without running the network.

What depends on the timestep alone, on a class label alone or on positions alone is computed on both sides for every
value that there is; rows of quantizers are compared by :mod:`qdexport.check.float64.quantizer_rows`; the constants of
the text's first token are compared with its projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qdexport.check.float64.alone import Condition, Pairing, fitted_rows, pair, record
from qdexport.check.float64.compare import Distance, distance, row_distances
from qdexport.check.float64.graph import Float64Graph
from qdexport.check.float64.halves import inverses, stored_roundings
from qdexport.check.float64.network import Carried, Float64Network, Tolerances
from qdexport.check.float64.quantizer_rows import check_layer_rows, check_softmax_rows, check_step_lookup
from qdexport.check.float64.table_check import TableCheck
from qdexport.core.network_facts import NetworkFacts
from qdexport.models.rotary import POSITIONS
from qdexport.quant.attach import QuantizedModel
from qdexport.quant.modules import FirstToken

__all__ = ["check_tables"]

OnProgress = Callable[[int, int], None]
_TRIED: Final = 5  # rows at which values of the file are paired with PyTorch's
_ROWS_AT_ONCE: Final = 128
_TIME: Final = frozenset({"timestep"})
_LABELS: Final = frozenset({"class_labels"})
_POSITIONS: Final = frozenset({"img_ids", "txt_ids"})
_SMALL: Final = frozenset({"timestep", "time_ids", "image_size", "class_labels", "guidance"})


def check_tables(
    network: Float64Network,
    model: QuantizedModel,
    facts: NetworkFacts,
    inputs: Mapping[str, Tensor],
    on_progress: OnProgress | None = None,
) -> TableCheck:
    """Compares every row of every table.

    Args:
        network: the file, and where its layers lie.
        model: the fake-quant model.
        facts: what the file says about itself.
        inputs: of any denoiser call, with the types and sizes of the file's.
        on_progress: called with the tables done and their number.

    Raises:
        ParityError: an operator of the file cannot be executed.
    """
    found = TableCheck()
    run = network.graph_alone()
    conditions = _conditions(facts)
    factors = inverses(model.denoiser)  # what the file may multiply channels by where PyTorch does not
    limits = network.tolerances

    def paired(condition: Condition, samples: Sequence[Mapping[str, Tensor]], tolerance: float) -> Pairing:
        found.pairings.append(pair(run, network.graph, condition, samples, factors, tolerance))
        return found.pairings[-1]

    work: list[Callable[[], None]] = []
    for condition in record(model.denoiser, inputs, conditions):
        if condition.names == _TIME:
            steps = facts.time_table or model.timesteps
            samples = [{"timestep": network.timestep(step)} for step in steps] or [condition.inputs]
            paired(condition, _spread(samples), limits.timestep)
        elif condition.names == _LABELS and not inputs["class_labels"].is_floating_point():
            work.append(partial(_classes, found, run, partial(paired, condition), model, inputs, limits))
        elif condition.names == _POSITIONS:
            work.append(partial(_positions, found, run, partial(paired, condition), inputs, limits))
        else:
            paired(condition, [condition.inputs], limits.early)
    if facts.time_table is not None:
        work.append(partial(_time_rows, found, run, network, facts))
    if model.rows > 1:
        work.append(partial(check_step_lookup, found, run, network, model, facts))
        work.append(partial(check_layer_rows, found, network, model))
        work.append(partial(check_softmax_rows, found, network, model))
    work.append(partial(_first_token, found, run, network, model, inputs))
    for done, item in enumerate(work):
        item()
        if on_progress is not None:
            on_progress(done + 1, len(work))
    return found


def _conditions(facts: NetworkFacts) -> list[frozenset[str]]:
    """Inputs of a few numbers, of which the network makes something before it meets picture and text."""
    names = [frozenset({spec.name}) for spec in facts.io.inputs if spec.role in _SMALL]
    return [*names, *([_POSITIONS] if any(spec.role == "position_ids" for spec in facts.io.inputs) else [])]


def _spread(samples: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    last = len(samples) - 1
    return [samples[index] for index in sorted({round(i * last / (_TRIED - 1)) for i in range(_TRIED)})]


def _place(value: ir.Value) -> str:
    """The module that reads a value."""
    for use in value.uses():
        module = (use.node.name or "").rpartition("/")[0]
        if module:
            return module
    return value.name or "a value"


def _decibel(found: Distance) -> str:
    return f"{found.sqnr_db:.1f} dB"


def _differences(
    run: Float64Graph, pairing: Pairing, sample: Mapping[str, Tensor], tolerance: float
) -> Iterator[tuple[str, Distance]]:
    """Where the file makes something else of one value of the condition than PyTorch."""
    run.start(sample)
    for value, fit in pairing.expected(pairing.condition.values(sample)):
        found = run.value(value)
        apart = distance(fit(found), found)
        if not apart.worst <= tolerance:
            yield _place(value), apart
    for value in pairing.guards:
        if not bool((run.value(value) == 0).all()):
            yield _place(value), Distance(0.0, math.inf)


def _time_rows(found: TableCheck, run: Float64Graph, network: Float64Network, facts: NetworkFacts) -> None:
    pairing, steps = found.pairing(_TIME), list(facts.time_table or ())
    if pairing is None:
        return
    wrong = []
    # fractions are searched in the table, one at a time
    at_once = 1 if network.timestep(0).is_floating_point() else _ROWS_AT_ONCE
    for start in range(0, len(steps), at_once):
        some = steps[start : start + at_once]
        for row, place, apart in _wrong_rows(run, pairing, torch.cat([network.timestep(step) for step in some])):
            if not apart <= network.tolerances.timestep:
                wrong.append(f"row {start + row} (timestep {some[row]:g}) is off by {apart:.2g} at {place}")
    found.rows["time table"] = len(steps)
    found.wrong("the time table differs from what the model makes of the timestep", wrong)
    if pairing.unknown:
        found.notes.append(
            f"{len(pairing.unknown)} values of the time table are compared at the steps of the calls alone, the first "
            f"is read by {_place(pairing.unknown[0])}"
        )
    _missing_rows(found, run, network, pairing, facts)


def _wrong_rows(run: Float64Graph, pairing: Pairing, steps: Tensor) -> Iterator[tuple[int, str, float]]:
    """For every row its worst distance, and where that is: ``[T]`` timesteps at once."""
    run.start({"timestep": steps})
    leaves = pairing.condition.rows({"timestep": steps[:, None]})
    worst, places = torch.zeros(len(steps), dtype=torch.float64), [""] * len(steps)
    for value, (index, factor) in pairing.values.items():
        stored = run.value(value)
        roundings = stored_roundings(value, scaled=factor is not None)
        apart = row_distances(fitted_rows(leaves[index], factor, stored), stored, roundings)
        for row in (apart > worst).nonzero().reshape(-1).tolist():
            worst[row], places[row] = apart[row], _place(value)
    for value in pairing.guards:
        bad = (run.value(value).reshape(len(steps), -1) != 0).any(dim=1)
        for row in bad.nonzero().reshape(-1).tolist():
            worst[row], places[row] = math.inf, _place(value)
    for row, place in enumerate(places):
        yield row, place, float(worst[row])


def _missing_rows(
    found: TableCheck, run: Float64Graph, network: Float64Network, pairing: Pairing, facts: NetworkFacts
) -> None:
    """A timestep without a row must read NaN, never another row."""
    known = sorted({float(step) for step in facts.time_table or ()})
    others: list[float] = [step for step in range(facts.training_steps) if step not in set(known)]
    if network.timestep(0).is_floating_point():
        others = [(a + b) / 2 for a, b in pairwise(known) if b - a > 1]
    values = [*pairing.guards, *pairing.values]
    if not values or not others:
        return
    at_once = 1 if network.timestep(0).is_floating_point() else len(others)
    wrong = []
    for start in range(0, len(others), at_once):
        some = others[start : start + at_once]
        run.start({"timestep": torch.cat([network.timestep(step) for step in some])})
        answered = (~run.value(values[0]).reshape(len(some), -1).isnan()).any(dim=1)
        rows = answered.nonzero().reshape(-1).tolist()
        wrong += [f"timestep {some[row]:g} has no row and reads one" for row in rows]
    found.rows["timesteps without a row"] = len(others)
    found.wrong("the lookup of the time table", wrong)


def _classes(
    found: TableCheck,
    run: Float64Graph,
    paired: Callable[..., Pairing],
    model: QuantizedModel,
    inputs: Mapping[str, Tensor],
    limits: Tolerances,
) -> None:
    """What the network makes of every class."""
    like = inputs["class_labels"]
    count = _class_count(model)
    if count is None:
        found.notes.append("the classes of the model were not found; those of the calls alone are compared")
        return
    rows = like.numel()
    samples = [
        {"class_labels": torch.arange(start, start + rows).clamp(max=count - 1).reshape(like.shape).to(like.dtype)}
        for start in range(0, count, rows)
    ]
    pairing = paired(_spread(samples), limits.tensor)
    wrong = []
    for sample in samples:
        run.start(sample)
        for value, fit in pairing.expected(pairing.condition.values(sample)):
            stored = run.value(value)
            expected = fit(stored)
            for position, label in enumerate(sample["class_labels"].reshape(-1).tolist()):
                apart = distance(expected[position : position + 1], stored[position : position + 1])
                if not apart.worst <= limits.tensor:
                    wrong.append(f"class {label} ({_decibel(apart)}, read by {_place(value)})")
    found.rows["classes"] = count
    found.wrong("the embedding of a class differs", list(dict.fromkeys(wrong)))
    if not pairing.values or pairing.unknown:
        found.notes.append("embeddings of classes are compared at the classes of the calls alone")


def _class_count(model: QuantizedModel) -> int | None:
    """Rows of the table of classes, the one for no class among them."""
    for name, module in model.denoiser.named_modules():
        if isinstance(module, torch.nn.Embedding) and "class" in name:
            return module.num_embeddings
    return None


def _positions(
    found: TableCheck,
    run: Float64Graph,
    paired: Callable[..., Pairing],
    inputs: Mapping[str, Tensor],
    limits: Tolerances,
) -> None:
    """What the network makes of every position of a token."""
    images, texts = inputs["img_ids"], inputs["txt_ids"]
    samples = []
    for start in range(0, POSITIONS, images.shape[0]):
        column = torch.arange(start, start + images.shape[0]).clamp(max=POSITIONS - 1)
        samples.append({"img_ids": column[:, None].expand(images.shape).contiguous(), "txt_ids": texts})
    pairing = paired(_spread(samples), limits.tensor)
    wrong = []
    for sample in samples:
        for place, apart in _differences(run, pairing, sample, limits.tensor):
            first, last = int(sample["img_ids"].min()), int(sample["img_ids"].max())
            wrong.append(f"a position from {first} to {last} ({_decibel(apart)}, read by {place})")
    found.rows["positions"] = POSITIONS
    found.wrong("the table of positions differs", wrong)
    if not pairing.values or pairing.unknown:
        found.notes.append("tables of positions are compared at the positions of the calls alone")


def _first_token(
    found: TableCheck, run: Float64Graph, network: Float64Network, model: QuantizedModel, inputs: Mapping[str, Tensor]
) -> None:
    """The constants of the text's first token: its projection, that of a zero token, and NaN for any other."""
    if model.bos is None or "encoder_hidden_states" not in inputs:
        return
    wrong, missing = [], []
    text = inputs["encoder_hidden_states"].clone()
    kinds = {"the first token": model.bos.embedding, "a zero token": torch.zeros_like(model.bos.embedding)}
    for kind, token in {**kinds, "another token": -2 * model.bos.embedding + 1}.items():
        text[:, 0] = token.to(text.dtype)
        run.start({"encoder_hidden_states": text})
        for name, module in model.denoiser.named_modules():
            if not isinstance(module, FirstToken):
                continue
            layer, value = name.rpartition(".")[0], network.first_tokens.get(name)
            if value is None:
                missing.append(name)
                continue
            expected = _projection(model.denoiser.get_submodule(layer), token, network.carried(layer))
            stored = run.value(value).reshape(-1, len(expected))
            if kind not in kinds:
                expected = torch.full_like(expected, math.nan)
            apart = distance(expected.expand(stored.shape), stored, stored_roundings(value))
            if not apart.worst <= network.tolerances.tensor:
                wrong.append(f"{layer}, {kind} ({_decibel(apart)})")
    found.rows["constants of the first token"] = 3 * len(network.first_tokens)
    found.wrong("keys and values of the text's first token differ", wrong)
    if missing:
        found.notes.append(f"the constant of {missing[0]} was not found in the file; calls alone compare it")


def _projection(layer: Any, token: Tensor, carried: Sequence[Carried]) -> Tensor:
    """What a layer makes of a token, float64 ``[C]``; with a ``1 / r`` that its constants were rounded with."""
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    made = []
    for constant in (layer.weight.detach(), bias.detach()):
        scaled = constant.to(torch.float64)
        for item in carried:
            scaled[item.part] *= item.inverse.reshape([-1] + [1] * (constant.dim() - 1))
        made.append(scaled.to(constant.dtype).double() if carried else scaled)
    weight, offset = made
    return F.linear(token.double(), weight, offset)
