"""(Plan, what the job is told, template) -> SkyPilot's task, as plain data. Pure."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

from job.contract.environ import JobEnviron
from job.contract.errors import FtjobError
from job.contract.submission import Way
from launch.plan import DATA, Mount, Place, Plan

RUN_LABEL: Final = "ftjob-run"
"""Every machine of a run carries it, with the run's id; letters that all clouds allow in labels."""
_TEMPLATE: Final = Path("sky", "train.yaml")
_HOME_DATA: Final = f"~{DATA}"
"""SkyPilot reaches a path elsewhere by a link, which leads nowhere inside a container."""


def read_template() -> dict[str, Any]:
    """sky/train.yaml, parsed: beside the checkout, or where an installed ftjob put it.

    Raises:
        FtjobError: it is not there.
    """
    for folder in (Path(__file__).parents[1], Path(sysconfig.get_path("data"), "share", "ftjob")):
        if (folder / _TEMPLATE).is_file():
            import yaml  # SkyPilot brings it

            template: dict[str, Any] = yaml.safe_load((folder / _TEMPLATE).read_text(encoding="utf-8"))
            return template
    raise FtjobError("sky/train.yaml is missing from this installation of ftjob", hint="install it again")


def task_of(plan: Plan, environ: JobEnviron, template: Mapping[str, Any]) -> dict[str, Any]:
    """The task that runs a plan.

    Values of secrets are not in it: SkyPilot is given them apart, and here they are null.

    Args:
        template: sky/train.yaml, parsed.
    """
    task = deepcopy(dict(template))
    mounted = environ.model_copy(update={"mounts": {mount.uri: f"{DATA}/{mount.file}" for mount in plan.mounts}})
    images = {"FTJOB_IMAGE": plan.image, "FTJOB_INSIDE_IMAGE": plan.inside_image, "FTJOB_PYTHON": plan.python}
    task["name"] = job_name(plan.run_id)
    task["resources"] = {
        **task["resources"],
        "labels": {RUN_LABEL: plan.run_id},
        "any_of": [_resource(place, plan) for place in plan.places],
    }
    task["envs"] = {
        **mounted.variables(),
        **{name: value for name, value in images.items() if value},
        **({"FTJOB_MAX_SECONDS": str(plan.max_seconds)} if plan.max_seconds is not None else {}),
        **plan.variables,
    }
    if plan.secrets:
        task["secrets"] = dict.fromkeys(plan.secrets)
    if plan.mounts:
        task["file_mounts"] = dict(_file_mount(mount) for mount in plan.mounts)
    return task


def as_yaml(task: Mapping[str, Any]) -> str:
    """A task as people read it."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Shows a script as the lines that it is."""

    def text_of(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, text_of)
    shown: str = yaml.dump(dict(task), Dumper=Dumper, sort_keys=False, width=120)
    return shown


def job_name(run_id: str) -> str:
    """What SkyPilot calls the run's job. A name of SkyPilot's begins with a letter, which a run's id need not."""
    return f"ftjob-{run_id}"


def _resource(place: Place, plan: Plan) -> dict[str, Any]:
    offer = place.offer
    resource: dict[str, Any] = {"infra": offer.infra, "accelerators": f"{offer.gpu}:{offer.gpus}"}
    if place.way is Way.HOST:
        return resource  # a cluster of one's own knows neither spot nor disks
    if offer.instance_type is not None and "(" not in offer.instance_type:  # GCP's "(attachable)" is none
        # Where this one is sold out SkyPilot would go on to the next dearer one, whose price no budget knows.
        resource["instance_type"] = offer.instance_type
    resource["use_spot"] = offer.spot
    if plan.disk_gb is not None:
        resource["disk_size"] = plan.disk_gb
    if place.way is Way.INSIDE:
        resource["image_id"] = f"docker:{plan.inside_image}"
    return resource


def _file_mount(mount: Mount) -> tuple[str, Any]:
    if mount.how == "copy":
        return f"{_HOME_DATA}/{mount.file}", mount.source
    return f"{_HOME_DATA}/{mount.folder}", {
        "source": mount.source,
        "mode": "MOUNT",
        "config": {"mount": {"read_only": True}},
    }
