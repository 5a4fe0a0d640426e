"""The command line: parse, call, print. The one place where errors become text and exit codes.

Answers go to stdout, everything else to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from job.contract.errors import BadInput, FtjobError
from launch.answer import has_colours, print_answer

if TYPE_CHECKING:
    from launch.here import Here
    from launch.view import Left, RunView
    from launch.wish import Wish

EXIT_ERROR: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

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
            from job.logs import mask

            # Libraries name addresses as they were given, with the password in them.
            click.echo(mask(f"ftjob: {error.message}"), err=True)
            if error.hint:
                click.echo(mask(f"hint: {error.hint}"), err=True)
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # In an old locale a letter may have no code: that must not become the exit code of a run that succeeded.
        sys.stdout.reconfigure(errors="replace")
    cli(prog_name="ftjob")


# --------------------------------------------------------------------------------------------- what commands share

bucket_option = click.option("--bucket", metavar="URI", help="Where runs live: s3://bucket/prefix or file:///folder.")
json_option = click.option("--json", "as_json", is_flag=True, help="Answer with JSON, on one line of stdout.")


def _here() -> Here:
    """This person's settings and backends. A context object, where there is one, makes backends: tests and tools."""
    from launch.here import Here, open_backend
    from launch.settings import read_settings

    settings = read_settings(os.environ)
    # Into the environment, so that boto3 here and in a job on this machine find the same server.
    os.environ.update(settings.s3_variables(os.environ))
    return Here(settings, click.get_current_context().obj or open_backend)


def _print_view(view: RunView, left: Left | None, *, as_json: bool) -> None:
    """A run, and what is left of it when it is over."""
    from launch import render

    if as_json:
        print_answer(render.as_json(view.model_copy(update={"left": left})))
        return
    text = render.view_text(view)
    if left is not None:
        text.append(render.left_text(left))
    print_answer(text)


# ----------------------------------------------------------------------------------------------------------- launch


def shopping_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `plan` and `launch` share: where to buy what."""
    options = (
        click.option(
            "--gpu", metavar="GPU[:N][,...]", help="GPUs to buy, any of which will do: H100, or H100,A100-80GB:8."
        ),
        click.option("--infra", metavar="WHERE", help="local, slurm, or clouds: aws,gcp. By default every cloud."),
        click.option("--region", help="Only this region."),
        click.option(
            "--spot", "policy", flag_value="spot", default=True, help="Spot, where it is cheaper. The default."
        ),
        click.option("--no-spot", "policy", flag_value="on-demand", help="On demand only."),
        click.option(
            "--spot-then-on-demand",
            "policy",
            flag_value="spot-then-on-demand",
            help="Spot; on demand when no spot machine can be had.",
        ),
        click.option("--budget", metavar="USD", help="Ceiling over all attempts: 40; or +20, that much more."),
        click.option("--by", metavar="TIME", help="Land before then: 2026-12-01T18:00."),
        click.option(
            "--anyway",
            is_flag=True,
            help="Although it will not fit into the memory or the budget, or cannot be checked.",
        ),
        click.option("--image", metavar="NAME@sha256:...", help="The job's image, instead of that of settings.toml."),
        click.option("--show-task", is_flag=True, help="Show the task as SkyPilot will get it."),
        click.option(
            "--max-restarts",
            type=click.IntRange(0, 9_000),
            default=20,
            show_default=True,
            help="New attempts after deaths of the job.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _wish(**asked: Any) -> Wish:
    from launch.prices import Policy
    from launch.wish import Wish

    return Wish(**asked | {"policy": Policy(asked["policy"])})


@cli.command(
    epilog="""\b
Examples:
  ftjob plan recipe.json --gpu H100
  ftjob plan recipe.json --gpu H100,A100-80GB --infra aws,gcp --spot-then-on-demand
  ftjob plan recipe.json --gpu H100 --json | jq '.places[0].offer'
"""
)
@click.argument("recipe", type=click.Path(path_type=Path))
@shopping_options
@bucket_option
@json_option
def plan(recipe: Path, show_task: bool, as_json: bool, **asked: Any) -> None:
    """What `launch` would do: the offers, the one chosen and why, and where everything goes. Creates nothing.

    Works without a network where SkyPilot's catalog is on this machine; which clouds are enabled is asked by `launch`.
    """
    from launch.attended import plan_run
    from launch.launching import prepare

    prepared = prepare(_here(), _wish(recipe=recipe, **asked), for_launch=False)
    click.get_current_context().exit(plan_run(prepared, show_task=show_task, as_json=as_json))


@cli.command(
    epilog="""\b
Examples:
  ftjob check recipe.json
  ftjob check recipe.json --show 3
  ftjob check recipe.json --problems 1000 | less
  ftjob check recipe.json --json | jq '.problems[] | select(.severity == "error")'

\b
Exit codes: 0 it may be launched (there may be warnings), 2 it would be refused.
"""
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--show", type=click.IntRange(1, 100), metavar="N", help="Show N rows token by token, and what is trained."
)
@click.option(
    "--problems",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    metavar="N",
    help="Problems of each kind to list; all are counted.",
)
@json_option
def check(recipe: Path, show: int | None, problems: int, as_json: bool) -> None:
    """Find what would train nothing, or the wrong thing, before money flows: in the rows, in what the chat template
    makes of them, in what is cut. Creates nothing; needs no GPU and no torch.

    Every row is rendered by the base model's own tokenizer and chat template, as the job will do it. `plan` and
    `launch` check the same, and the job trains exactly what was checked.
    """
    if show is not None and as_json:
        raise click.UsageError("--show is for people: leave --json out")
    from launch import render
    from launch.commands import check_of
    from launch.render_check import check_text

    written, found = check_of(_here(), recipe, shown=problems, show=show or 0)
    if as_json:
        print_answer(render.as_json(found.check))
    else:
        print_answer(check_text(found.check, written, found.shown, colours=has_colours()))
    click.get_current_context().exit(EXIT_BAD_INPUT if found.check.errors else 0)


@cli.command(
    epilog="""\b
Examples:
  ftjob launch --infra local examples/quickstart.json
  ftjob launch --gpu H100 recipe.json
  ftjob launch --gpu H100 --yes --detach --name my-run recipe.json
  ftjob launch --json --infra local recipe.json | jq -r .adapter
  ftjob launch --run my-run --gpu H100   go on with a run that stands still
"""
)
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@shopping_options
@click.option("--name", metavar="ID", help="Id of the new run; by default made of the recipe's name and the time.")
@click.option("--run", "run_id", metavar="RUN", help="Go on with this run instead of starting a new one.")
@click.option("--yes", "-y", is_flag=True, help="Buy without asking.")
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan, and stop.")
@click.option("--detach", is_flag=True, help="Return at once; the run goes on by itself.")
@bucket_option
@json_option
def launch(
    recipe: Path | None,
    yes: bool,
    dry_run: bool,
    show_task: bool,
    detach: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Train what RECIPE says, and stay with the run until the adapter is there. Without --gpu: on this machine.

    Ctrl-C stops the run: the job saves its work first, and `ftjob launch --run RUN` goes on. A closed terminal or
    a killed launcher does not touch the run.
    """
    if recipe is None and asked["run_id"] is None:
        raise click.UsageError("name a RECIPE, or a run with --run RUN")
    if asked["run_id"] is not None and asked["name"] is not None:
        raise click.UsageError("--name is for new runs: leave it out with --run")
    from launch.attended import launch_run

    wish = _wish(recipe=recipe, **asked)
    code = launch_run(_here(), wish, yes=yes, dry_run=dry_run, show_task=show_task, detach=detach, as_json=as_json)
    click.get_current_context().exit(code)


# ------------------------------------------------------------------------------------------------- about runs


@cli.command(epilog="\b\nExamples:\n  ftjob status\n  ftjob status my-run --json | jq -r .status\n")
@click.argument("run", required=False)
@click.option("--watch", is_flag=True, help="Stay with it until it is over; stop it if it outlives its budget.")
@bucket_option
@json_option
def status(run: str | None, watch: bool, bucket: str | None, as_json: bool) -> None:
    """How RUN is: progress, losses, last commit, attempts. Without RUN: the newest run."""
    from launch.commands import left_behind, view_run, watch_run

    here = _here()
    view = view_run(here, run, bucket)
    if watch and not view.status.is_over:
        view = watch_run(here, view.run_id, view.bucket)
    _print_view(view, left_behind(here, view), as_json=as_json)


@cli.command("list", epilog="\b\nExamples:\n  ftjob list\n  ftjob list --bucket s3://mine/ftjob --json\n")
@bucket_option
@json_option
def list_(bucket: str | None, as_json: bool) -> None:
    """The runs of a bucket, newest first. Without --bucket: of every bucket that you launched runs into."""
    from launch import render
    from launch.commands import views_of_buckets

    views = views_of_buckets(_here(), bucket)
    if as_json:
        print_answer(render.as_json(views))
    elif views:
        print_answer(render.list_table(views))
    else:
        click.echo("no runs yet", err=True)


@cli.command(
    epilog="\b\nExamples:\n  ftjob logs my-run\n  ftjob logs my-run --follow\n  ftjob logs my-run --json | jq .event\n"
)
@click.argument("run")
@click.option("--follow", "-f", is_flag=True, help="Go on until the run stops.")
@bucket_option
@click.option("--json", "as_json", is_flag=True, help="The lines as they were written.")
def logs(run: str, follow: bool, bucket: str | None, as_json: bool) -> None:
    """What the job of RUN said, all attempts in order."""
    from job.logs import mask
    from launch import render
    from launch.commands import log_lines

    for line in log_lines(_here(), run, bucket, follow=follow):
        click.echo(mask(line) if as_json else render.log_line(line))


@cli.command(epilog="\b\nExamples:\n  ftjob receipt my-run\n  ftjob receipt my-run --json | jq .cents\n")
@click.argument("run")
@bucket_option
@json_option
def receipt(run: str, bucket: str | None, as_json: bool) -> None:
    """What RUN has cost until now, attempt by attempt and to the cent, and what for."""
    from launch import render
    from launch.commands import receipt_of_run
    from launch.render_receipt import receipt_table

    found = receipt_of_run(_here(), run, bucket)
    print_answer(render.as_json(found) if as_json else receipt_table(found))


@cli.command(epilog="\b\nExamples:\n  ftjob cancel my-run\n")
@click.argument("run")
@bucket_option
@json_option
def cancel(run: str, bucket: str | None, as_json: bool) -> None:
    """Stop RUN: the job saves its work and ends. `ftjob launch --run RUN` goes on with it."""
    from launch.commands import cancel_run, left_behind

    here = _here()
    store = here.store(run, bucket)
    view = cancel_run(store, run, here.backend_of(run, store))
    _print_view(view, left_behind(here, view), as_json=as_json)


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
    print_answer(render.as_json(fetched) if as_json else render.fetched_text(fetched))


@cli.command(epilog="\b\nExamples:\n  ftjob schema > recipe.schema.json\n")
def schema() -> None:
    """The JSON Schema of recipes, for editors that complete and check: "$schema": "./recipe.schema.json"."""
    import json

    from launch.recipe_file import recipe_schema

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
    from launch.render_certificate import certificate_text

    found = chaos_run(_here(), recipe, kills=kills, seed=seed, keep=keep)
    print_answer(render.as_json(found) if as_json else certificate_text(found))
    click.get_current_context().exit(0 if found.certificate.clean else EXIT_ERROR)


if __name__ == "__main__":
    main()
