"""How every tool here runs its command line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import click

from qdexport.errors import INTERRUPTED_EXIT_CODE, QdExportError

if TYPE_CHECKING:
    from click import Command

__all__ = ["run_command"]


def run_command(command: Command, stopped: str = "") -> NoReturn:
    """Runs a command line; errors meant for the user end with their exit code and one line.

    Args:
        command: what was decorated with ``click.command``.
        stopped: said after Ctrl-C.
    """
    try:
        code = command.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):
        if stopped:
            click.echo(stopped, err=True)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except QdExportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    # click returns the code of --help and of context.exit here, and a command's result, which is None
    sys.exit(code if isinstance(code, int) else 0)
