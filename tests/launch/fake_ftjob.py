"""The `ftjob` command with a stand-in for the job: fake_ftjob.py PLAN ARGUMENTS..."""

from __future__ import annotations

import sys

from launch.cli import cli
from tests.launch.kit import backend_maker

if __name__ == "__main__":
    cli(args=sys.argv[2:], prog_name="ftjob", obj=backend_maker(sys.argv[1]))
