"""Runs the tests under everything that must not decide them: threads, order, processor, and a busy machine."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
_EXAMPLES = """\b
Examples:
  python tools/test_matrix.py                                  every setting, all tests (2 hours on two cores)
  python tools/test_matrix.py --setting threads-2 tests/quant  one setting, one folder
  python tools/test_matrix.py --setting order-1 --seed 47      the order of a run that failed
  python tools/test_matrix.py --together --setting threads-1 --setting order-1   both in one run
"""
# what is really used: OpenBLAS takes another kernel where the processor cannot do what was asked for
_CORE_NAME = """
import ctypes, pathlib, numpy
(library,) = (pathlib.Path(numpy.__file__).parents[1] / "numpy.libs").glob("libscipy_openblas64_*")
name = ctypes.CDLL(str(library)).scipy_openblas_get_corename64_
name.restype = ctypes.c_char_p
print(name().decode())
"""
_HASWELL = {"Haswell", "Zen"}  # one set of kernels, by two names
# an older processor for all but ONNX Runtime, which has no switch
_AVX2 = {
    "OPENBLAS_CORETYPE": "Haswell",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL",
}
_BUSY = "import os\nwhile os.getppid() == {parent}:\n    for _ in range(10**6):\n        pass\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Environment and arguments of one run of pytest; ``busy`` keeps every processor occupied meanwhile."""

    environment: dict[str, str]
    arguments: tuple[str, ...] = ()
    busy: bool = False


def settings_of(seed: int) -> dict[str, Setting]:
    """Every setting by name; ``seed`` and the next one give the orders."""
    found = {}
    for threads in ("1", "2"):
        counts = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        found[f"threads-{threads}"] = Setting(environment=counts)
    for number in (1, 2):
        order = ("--random-order-bucket=module", f"--random-order-seed={seed + number - 1}")
        found[f"order-{number}"] = Setting(environment={}, arguments=order)
    for core in ("Haswell", "Zen", "SkylakeX"):
        found[f"openblas-{core}"] = Setting(environment={"OPENBLAS_CORETYPE": core})
    found["avx2"] = Setting(environment=_AVX2)
    found["busy"] = Setting(environment={}, busy=True)
    return found


def together(chosen: dict[str, Setting]) -> dict[str, Setting]:
    """One setting that is all of these at once; of two that set the same variable or give two orders, the last."""
    environment = {key: value for setting in chosen.values() for key, value in setting.environment.items()}
    arguments = {value.partition("=")[0]: value for setting in chosen.values() for value in setting.arguments}
    busy = any(setting.busy for setting in chosen.values())
    name = "+".join(chosen)
    return {name: Setting(environment=environment, arguments=tuple(arguments.values()), busy=busy)}


def impossible(setting: Setting) -> str:
    """Why this processor cannot run a setting; empty when it can."""
    wanted = setting.environment.get("OPENBLAS_CORETYPE")
    if wanted is None:
        return ""
    environment = {**os.environ, "OPENBLAS_CORETYPE": wanted}
    command = [sys.executable, "-c", _CORE_NAME]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    used = child.stdout.strip()
    same = used == wanted or {used, wanted} <= _HASWELL
    return "" if same else f"OpenBLAS uses {used or 'kernels that it does not name'} instead"


@contextlib.contextmanager
def busy_processors() -> Iterator[None]:
    """A loop on every processor, which ends with this process at the latest."""
    command = [sys.executable, "-c", _BUSY.format(parent=os.getpid())]
    loops = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(name: str, setting: Setting, arguments: tuple[str, ...]) -> bool:
    """Runs pytest under a setting; whether all tests passed."""
    given = [f"{key}={value!r}" for key, value in setting.environment.items()]
    click.secho(f"\n== {name}: {' '.join((*given, *setting.arguments)) or 'a loop on every processor'}", bold=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
    with busy_processors() if setting.busy else contextlib.nullcontext():
        done = subprocess.run(
            [*command, *setting.arguments, *arguments], cwd=ROOT, env={**os.environ, **setting.environment}, check=False
        )
    if done.returncode < 0:
        click.echo(f"pytest was killed by signal {-done.returncode}", err=True)
    return done.returncode == 0


@click.command(
    epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True}
)
@click.option("--setting", "chosen", multiple=True, type=click.Choice(list(settings_of(0))), help="These alone.")
@click.option("--together", "together_", is_flag=True, help="The chosen settings in a single run, to save time.")
@click.option("--seed", type=int, help="Of the first random order; drawn and printed otherwise.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def cli(chosen: tuple[str, ...], together_: bool, seed: int | None, arguments: tuple[str, ...]) -> None:
    """Run the tests with one thread and with two, in two random orders, with each kernel set of OpenBLAS that this
    processor has, as on a processor without AVX-512, and beside a loop on every core. ARGUMENTS go to pytest. Fails
    when a test fails under any.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    click.echo(f"orders begin at seed {seed}: `--seed {seed}` repeats them")
    told, failed = [], False
    settings = {name: setting for name, setting in settings_of(seed).items() if not chosen or name in chosen}
    for name, setting in (together(settings) if together_ and chosen else settings).items():
        reason = impossible(setting)
        started = time.monotonic()
        word = "left out" if reason else "ok" if run(name, setting, arguments) else "FAILED"
        failed |= word == "FAILED"
        told.append(f"{name:<18} {word:<9} {reason or f'{time.monotonic() - started:.0f} s'}")
    click.echo("\n== summary\n" + "\n".join(told))
    sys.exit(int(failed))


if __name__ == "__main__":
    cli()
