"""Which schedulers of diffusers work with a compiled network: each with its spacings and sigmas, 1 to 50 steps.

    python tools/scheduler_table.py            # prints the table of docs/schedulers.md; minutes
    python tools/scheduler_table.py Euler Heun # of some, by the beginning of their names

Each is put into a tiny Stable Diffusion of random weights, which samples in four steps. Its schedules are asked for
rows of the table that `auto` makes for a model with whole timesteps (another scheduler of a compiled folder), and of
the one that it makes for this scheduler (the model's own).
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.core.network_facts import NetworkFacts
from qdexport.errors import QdExportError
from qdexport.models.load import load_model
from qdexport.models.sampling import SampleRequest, sample
from qdexport.models.scheduler_choice import scheduler_names, with_scheduler
from qdexport.models.schedules import scheduler_timesteps
from qdexport.models.tiny import save_tiny_pipeline
from qdexport.pipeline.time_rows import has_fractional_steps, time_rows, timestep_bounds

if TYPE_CHECKING:
    from qdexport.models.loaded import LoadedModel
    from qdexport.quant.attach import QuantizedModel

STEPS = (*range(1, 11), 15, 20, 25, 28, 30, 40, 50)
SAMPLED = 4  # PNDM takes no fewer
LISTED = ("timestep_spacing", "beta_schedule", "prediction_type", "use_karras_sigmas", "use_exponential_sigmas",
          "use_beta_sigmas", "use_lu_lambdas", "final_sigmas_type", "algorithm_type", "solver_order")  # fmt: skip
VALUES: dict[str, tuple[str, ...]] = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_order": ("1", "3"),
}


def facts_of(timesteps: tuple[float, ...], rows: tuple[float, ...], *, fractions: bool) -> NetworkFacts:
    """What a network with these rows says about itself."""
    one = Dim(low=1, best=1, high=1)
    dtype = "float32" if fractions else "int64"
    timestep = TensorSpec(name="timestep", role="timestep", dtype=dtype, dims=(one,))
    return NetworkFacts(
        model="tiny", recipe="w8a8", recipe_digest="", target="onnxruntime", body="fp32", scheduler="", time_table=rows,
        training_steps=1000, scale_rows=(), io=IoSpec(inputs=(timestep,), outputs=()),
        timestep_bounds=(min(0, *timesteps), max(1000 if fractions else 999, *timesteps)),
    )  # fmt: skip


def settings_of(name: str) -> list[str]:
    """The default, and one setting after the other that changes something."""
    import diffusers

    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    changes = [
        f"{key}={value}" for key in LISTED if key in known for value in VALUES.get(key, ("true",))
        if key != "final_sigmas_type"
    ]  # fmt: skip
    return ["", *changes]


def answer(function: Any) -> str:
    """`works`, or the sentence that a user reads."""
    try:
        function()
    except QdExportError as error:
        return _sentence(error)
    return "works"


def _sentence(error: QdExportError) -> str:
    """What failed, without the numbers and paths of this run."""
    words = re.sub(r" \[[^\]]*\](?: \.\.\.)?| in \d+ steps| of /\S+", "", str(error).split("; ")[0])
    return words.replace("|", "/").replace("<", "&lt;")


def as_own(loaded: LoadedModel, timesteps: tuple[float, ...]) -> None:
    """Asks for the rows that a model with this scheduler of its own gets."""
    recipe = SimpleNamespace(time_embedding="auto")
    model = cast("QuantizedModel", SimpleNamespace(recipe=recipe, timesteps=timesteps, loaded=loaded, body="fp32"))
    fractions = has_fractional_steps(model)
    rows = time_rows(model, 100, fractions=fractions) or ()
    facts_of(timestep_bounds(model, fractions=fractions), rows, fractions=fractions).check_timesteps(timesteps)


def in_numbers(answers: dict[int, str]) -> str:
    """The answers of all numbers of steps: one, or what most get and the numbers that get another."""
    kinds: dict[str, list[int]] = {}
    for steps, words in answers.items():
        kind = words if words == "works" else ("refused: fractions" if "whole ones" in words else f"refused: {words}")
        kinds.setdefault(kind, []).append(steps)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{kind} ({_ranges(steps)})" for kind, steps in kinds.items())


def _ranges(steps: list[int]) -> str:
    places = [STEPS.index(step) - place for place, step in enumerate(steps)]
    pairs = itertools.groupby(zip(places, steps, strict=True), lambda pair: pair[0])
    groups = [[step for _, step in group] for _, group in pairs]
    return ", ".join(f"{group[0]}" if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)


def in_both(loaded: LoadedModel, steps: int) -> tuple[str, str]:
    """The answers of a folder with all whole timesteps, and of one made for this scheduler."""
    every = facts_of((0,), tuple(range(1000)), fractions=False)
    try:
        timesteps = tuple(scheduler_timesteps(loaded, steps))
    except QdExportError as error:
        return (words := _sentence(error)), words
    return answer(lambda: every.check_timesteps(timesteps)), answer(lambda: as_own(loaded, timesteps))


def row(model: LoadedModel, name: str, setting: str) -> tuple[str, str]:
    """The two last columns of a line."""
    try:
        loaded = with_scheduler(model, ",".join(filter(None, (name, setting))))
    except QdExportError as error:
        return f"refused: {_sentence(error)}", "-"
    request = SampleRequest(prompts=("a",), steps=SAMPLED, guidance_scale=1.0)
    sampled = answer(lambda: sample(loaded, request))
    if sampled != "works":
        return f"refused: {sampled}", "refused likewise, in the first call"
    answers = {steps: in_both(loaded, steps) for steps in STEPS}
    other, own = ({steps: words[side] for steps, words in answers.items()} for side in (0, 1))
    return in_numbers(other), in_numbers(own)


def main() -> None:
    wanted = tuple(sys.argv[1:]) or ("",)
    print("| scheduler | settings | in a folder of another scheduler | as the model's own |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        model = load_model(save_tiny_pipeline(Path(scratch) / "model", "sd"))
        for name in (name for name in scheduler_names() if name.startswith(wanted)):
            lines: dict[tuple[str, str], list[str]] = {}
            try:
                settings = settings_of(name)
            except (AttributeError, ImportError):
                settings = [""]
            for setting in settings:
                lines.setdefault(row(model, name, setting), []).append(setting or "as the model's")
                if len(lines) == 1 and next(iter(lines))[1] in ("-", "refused likewise, in the first call"):
                    break  # no setting makes a scheduler of another kind fit
            for (other, own), settings in lines.items():
                shown = "any" if len(lines) == 1 else ", ".join(settings)
                print(f"| {name.removesuffix('Scheduler')} | {shown} | {other} | {own} |", flush=True)


if __name__ == "__main__":
    main()
