"""Promise: what the README says is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

from job.contract.outcome import EXIT_CODES
from launch.cli import cli
from launch.recipe_file import parse_recipe, read_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def command(number: int) -> str:
    found = re.search(rf"<!-- command {number} -->\n```bash\n(.+?)\n```", README)
    assert found is not None
    return found[1]


def test_ci_runs_the_readmes_test_command_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == command(2)
    assert lines[2:-1] == ["set -euo pipefail", 'cd "$(dirname "$0")/.."']


def test_the_first_command_launches_the_quickstart_that_is_there() -> None:
    assert command(1).endswith("ftjob launch --infra local examples/quickstart.json")
    read_recipe(ROOT / "examples" / "quickstart.json")


def test_the_recipe_shown_is_a_recipe() -> None:
    found = re.search(r"## The recipe\n\n```json\n(.+?)```", README, re.DOTALL)
    assert found is not None
    parse_recipe(json.dumps(json.loads(found[1])), name="README")


def test_every_command_is_described_and_every_described_command_exists() -> None:
    described = {name for cell in re.findall(r"^\| (`ftjob .+?) \|", README, re.MULTILINE) for name in _names(cell)}
    assert described == set(cli.commands)


def _names(cell: str) -> list[str]:
    return re.findall(r"`ftjob ([a-z]+)", cell)


def test_every_exit_code_is_described() -> None:
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)} == set(EXIT_CODES.values())
