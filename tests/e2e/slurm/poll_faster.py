"""Makes SkyPilot's watch over jobs quick, and independent of the internet. Copied into the tests' environment only.

SkyPilot asks two public addresses whether there is a network before it looks at a job; offline it never looks. It
then looks every 15 s. Both are constants of modules, so they are replaced when those modules have been imported.
Asleep unless FTJOB_TEST_HEALTH_URL names what to ask instead. Standard library only; SkyPilot 0.14.1.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

HEALTH_URL = os.environ.get("FTJOB_TEST_HEALTH_URL")

REPLACED: dict[str, dict[str, object]] = {
    "sky.jobs.utils": {"JOB_STATUS_CHECK_GAP_SECONDS": 2, "JOB_STARTED_STATUS_CHECK_GAP_SECONDS": 1},
    "sky.jobs.managed_job_refresh_thread": {"_RECOVERY_WAIT_AFTER_ACQUIRE_SECONDS": 1},
    "sky.backends.backend_utils": {"_TEST_IP_LIST": [HEALTH_URL]},
}


class Replacing(importlib.machinery.SourceFileLoader):
    """Executes a module, then replaces constants in it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for name, value in REPLACED[module.__name__].items():
            if not hasattr(module, name):
                raise ImportError(f"{module.__name__} has no {name}: this is another SkyPilot than the tests know")
            setattr(module, name, value)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules above, and nothing else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in REPLACED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = Replacing(name, spec.origin)
        return spec


if HEALTH_URL:
    sys.meta_path.insert(0, Finder())
