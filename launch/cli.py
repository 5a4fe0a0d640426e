"""The command line: parse, call, print. The one place where errors become text and exit codes.

Answers go to stdout, everything else to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from job.contract.errors import BadInput, FtjobError

if TYPE_CHECKING:
    from launch.commands import Here

EXIT_ERROR: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

PIPE_COLUMNS: Final = 500
"""Width of a table that no terminal bounds."""

EPILOG: Final = """\b
Exit codes of a launch that was watched to its end:
  0   done, the adapter is published
  1   failed; another attempt would fail the same way
  2   something that was written or named cannot be used; nothing was created
  3   out of budget, the best adapter so far is published
  75  stopped or interrupted; `ftjob launch --run RUN` goes on
"""


class Commands(click.Group):
    """Turns errors into a message, a hint and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FtjobError as error:
            click.echo(f"ftjob: {error.message}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)
            ctx.exit(EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_ERROR)
        except KeyboardInterrupt:
            click.echo("ftjob: interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def _show_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from launch.settings import ftjob_version

        click.echo(f"ftjob {ftjob_version()}")
        ctx.exit()


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show it.")
def cli() -> None:
    """Recipe in, LoRA adapter out: resumable, verified fine-tuning runs."""


def main() -> None:
    """The `ftjob` command."""
    cli(prog_name="ftjob")


# --------------------------------------------------------------------------------------------- what commands share

bucket_option = click.option("--bucket", metavar="URI", help="Where runs live: s3://bucket/prefix or file:///folder.")
json_option = click.option("--json", "as_json", is_flag=True, help="Answer with JSON, on one line of stdout.")


def _here() -> Here:
    """This person's settings and backends. A context object, where there is one, makes backends: tests and tools."""
    from launch.commands import Here, open_backend
    from launch.settings import read_settings

    return Here(read_settings(os.environ), click.get_current_context().obj or open_backend)


def _print(answer: Any) -> None:
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


# ----------------------------------------------------------------------------------------------------------- launch


@cli.command(
    epilog="""\b
Examples:
  ftjob launch examples/quickstart.json
  ftjob launch --detach --name my-run recipe.json
  ftjob launch --json recipe.json | jq -r .adapter
  ftjob launch --run my-run          go on with a run that stands still
"""
)
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--infra", default="local", show_default=True, help="What runs the job.")
@click.option("--name", metavar="ID", help="Id of the new run; by default made of the recipe's name and the time.")
@click.option("--run", "run_id", metavar="RUN", help="Go on with this run instead of starting a new one.")
@click.option("--detach", is_flag=True, help="Return at once; the run goes on by itself.")
@click.option(
    "--max-restarts",
    type=click.IntRange(0, 10_000),
    default=20,
    show_default=True,
    help="New attempts after deaths of the job.",
)
@bucket_option
@json_option
def launch(recipe: Path | None, name: str | None, run_id: str | None, **options: Any) -> None:
    """Train what RECIPE says, and stay with the run until the adapter is there.

    Ctrl-C stops the run: the job saves its work first, and `ftjob launch --run RUN` goes on. A closed terminal or
    a killed launcher does not touch the run.
    """
    if recipe is None and run_id is None:
        raise click.UsageError("name a RECIPE, or a run with --run RUN")
    if run_id is not None and name is not None:
        raise click.UsageError("--name is for new runs: leave it out with --run")
    from launch.commands import launch_run

    code = launch_run(_here(), recipe, name=name, run_id=run_id, **options)
    click.get_current_context().exit(code)


# ------------------------------------------------------------------------------------------------- about runs


@cli.command(epilog="\b\nExamples:\n  ftjob status\n  ftjob status my-run --json | jq -r .status\n")
@click.argument("run", required=False)
@bucket_option
@json_option
def status(run: str | None, bucket: str | None, as_json: bool) -> None:
    """How RUN is: progress, losses, last commit, attempts. Without RUN: the newest run."""
    from launch import render
    from launch.commands import view_run

    view = view_run(_here(), run, bucket)
    _print(render.as_json(view) if as_json else render.view_text(view))


@cli.command("list", epilog="\b\nExamples:\n  ftjob list\n  ftjob list --bucket s3://mine/ftjob --json\n")
@bucket_option
@json_option
def list_(bucket: str | None, as_json: bool) -> None:
    """The runs of a bucket, newest first. Without --bucket: of every bucket that you launched runs into."""
    from launch import render
    from launch.commands import views_of_buckets

    views = views_of_buckets(_here(), bucket)
    if as_json:
        _print(render.as_json(views))
    elif views:
        _print(render.list_table(views))
    else:
        click.echo("no runs yet", err=True)


@cli.command(
    epilog="\b\nExamples:\n  ftjob logs my-run\n  ftjob logs my-run --follow\n  ftjob logs my-run --json | jq .event\n"
)
@click.argument("run")
@click.option("--follow", "-f", is_flag=True, help="Go on until the run stops.")
@click.option("--json", "as_json", is_flag=True, help="The lines as they were written.")
def logs(run: str, follow: bool, as_json: bool) -> None:
    """What the job of RUN said, all attempts in order."""
    from job.logs import mask
    from launch import render

    for line in _here().backend_of(run).logs(run, follow=follow):
        click.echo(mask(line) if as_json else render.log_line(line))


@cli.command(epilog="\b\nExamples:\n  ftjob cancel my-run\n")
@click.argument("run")
@bucket_option
@json_option
def cancel(run: str, bucket: str | None, as_json: bool) -> None:
    """Stop RUN: the job saves its work and ends. `ftjob launch --run RUN` goes on with it."""
    from launch import render
    from launch.commands import cancel_run

    here = _here()
    store = here.store(run, bucket)
    view = cancel_run(store, run, here.backend_of(run, store))
    _print(render.as_json(view) if as_json else render.view_text(view))


@cli.command(epilog="\b\nExamples:\n  ftjob fetch my-run\n  ftjob fetch my-run ./adapter\n")
@click.argument("run")
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@bucket_option
@json_option
def fetch(run: str, directory: Path | None, bucket: str | None, as_json: bool) -> None:
    """Bring the adapter of RUN into DIR (by default ./RUN-adapter), and verify every byte of it."""
    from launch import render
    from launch.commands import fetch_run

    fetched = fetch_run(_here().store(run, bucket), run, directory or Path(f"{run}-adapter"))
    _print(render.as_json(fetched) if as_json else render.fetched_text(fetched))


@cli.command(epilog="\b\nExamples:\n  ftjob schema > recipe.schema.json\n")
def schema() -> None:
    """The JSON Schema of recipes, for editors that complete and check: "$schema": "./recipe.schema.json"."""
    import json

    from launch.commands import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


# ------------------------------------------------------------------------------------------------------------ chaos


@cli.command(
    epilog="""\b
Examples:
  ftjob chaos examples/quickstart.json
  ftjob chaos --kills 50 --seed 7 recipe.json

\b
Exit codes: 0 the certificate is clean, 1 it is not, 2 bad input.
"""
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--kills", type=click.IntRange(1, 1000), default=8, show_default=True, help="How often to kill it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the moments, the signals and the delays.")
@click.option("--keep", is_flag=True, help="Keep both runs, to look at them.")
@json_option
def chaos(recipe: Path, kills: int, seed: int, keep: bool, as_json: bool) -> None:
    """Prove that RECIPE resumes exactly: run it untouched, run it again under kills, compare every byte."""
    from launch import render
    from launch.commands import chaos_run

    found = chaos_run(_here(), recipe, kills=kills, seed=seed, keep=keep)
    _print(render.as_json(found) if as_json else render.certificate_text(found))
    click.get_current_context().exit(0 if found.certificate.clean else EXIT_ERROR)


if __name__ == "__main__":
    main()
