"""Feeds every parser of qdexport with changed valid inputs; only an error that is meant for users may come out."""

from __future__ import annotations

import collections
import contextlib
import logging
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from reliability.fuzz_parsers import all_parsers
from reliability.hostile_run import make_seeds
from reliability.mutate import mutated
from reliability.page import write_section

from qdexport.core.shown import one_line
from qdexport.errors import QdExportError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reliability.fuzz_parsers import Parser

_SECONDS = 30  # of one execution; a busy machine must not fail it
_EXAMPLES = """\b
Examples:
  python tools/fuzz_parsers.py                            20,000 executions
  python tools/fuzz_parsers.py --parser 'plan.json' --first 1234 --executions 1 --keep found
  python tools/fuzz_parsers.py --write-docs
"""


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--executions", type=click.IntRange(1), default=20_000, show_default=True)
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first execution.")
@click.option("--parser", help="This parser alone.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep inputs that end uncleanly in this folder.")
@click.option("--write-docs", is_flag=True, help="Rewrite the section in docs/reliability.md.")
def main(executions: int, first: int, parser: str | None, keep: Path | None, write_docs: bool) -> None:
    """Change valid inputs and parse them. Ends with 1 when a parser raises anything but an error for users, or hangs.

    Execution number N gives its parser the same input in every run.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        parsers = [item for item in all_parsers(make_seeds(Path(name))) if parser in (None, item.name)]
        started = time.monotonic()
        counts, unclean = fuzz(parsers, range(first, first + executions), keep)
        seconds = time.monotonic() - started
    for line in unclean:
        click.echo(one_line(line), err=True)
    told = f"{executions} executions of {len(parsers)} parsers in {seconds:.0f} s, {len(unclean)} without a clean end"
    click.echo(told, err=True)
    if write_docs:
        write_section("fuzzed parsers", _page(told, counts))
    sys.exit(bool(unclean))


def fuzz(
    parsers: list[Parser], numbers: range, keep: Path | None = None
) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """Executes numbered inputs, the parsers in turn.

    Returns:
        By parser how many were taken and how many refused; and a line for each that ended in no clean way.
    """
    counts: dict[str, collections.Counter[str]] = {item.name: collections.Counter() for item in parsers}
    unclean: list[str] = []
    others = tuple(data for item in parsers for data in item.inputs if len(data) < 200_000)
    logging.getLogger("qdexport").setLevel(logging.CRITICAL)  # what is damaged is said, thousands of times
    with tempfile.TemporaryDirectory(prefix="fuzz-input-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            item = parsers[number % len(parsers)]
            source = random.Random(f"{item.name} {number}")
            data = mutated(source, source.choice(item.inputs), others)
            path = Path(name) / f"input{item.suffix}"
            path.write_bytes(data)
            ending, told = _executed(item, path)
            counts[item.name][ending] += 1
            if told:
                unclean.append(f"{item.name}, execution {number}: {told}")
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{item.name.replace(' ', '-')}-{number}{item.suffix}").write_bytes(data)
    return counts, unclean


def _executed(item: Parser, path: Path) -> tuple[str, str]:
    try:
        with _alarm():
            item.parse(path)
    except QdExportError as error:
        text = str(error)
        return "refused", "" if text and "Traceback" not in text else f"a message that says nothing: {text[:80]!r}"
    except _LateError:
        return "late", f"no end within {_SECONDS} s"
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "unclean", f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
    return "taken", ""


class _LateError(BaseException):
    pass


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def late(_signal: int, _frame: Any) -> None:
        raise _LateError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _page(told: str, counts: dict[str, collections.Counter[str]]) -> str:
    lines = [
        "## Fuzzed parsers",
        "",
        f"`python tools/fuzz_parsers.py --write-docs`: {told}. Inputs are valid ones with bytes, numbers, words and",
        "values changed; a clean end is an accepted input, or an error that is meant for users.",
        "",
        "| parser | accepted | refused with a message | other |",
        "|---|---|---|---|",
    ]
    for name, count in counts.items():
        lines.append(f"| {name} | {count['taken']} | {count['refused']} | {count['unclean'] + count['late']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
