"""The answer of a command, on stdout: as a terminal shows it, or as a pipe can use it."""

from __future__ import annotations

from typing import Any, Final

import click

PIPE_COLUMNS: Final = 500
"""Width of a table that no terminal bounds."""


def print_answer(answer: Any) -> None:
    """Print a text or something that rich draws."""
    if isinstance(answer, str):
        click.echo(answer)
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    # soft_wrap: a uri that is cut in two by a line end cannot be copied.
    console.print(answer, soft_wrap=True, highlight=False)


def has_colours() -> bool:
    """Whether what is printed keeps its colours: in a terminal that has them, of a person who wants them."""
    from rich.console import Console

    console = Console()
    return console.is_terminal and console.color_system is not None and not console.no_color
