"""Deployments: what prefect.yaml schedules, registered with a Prefect server that stays."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from flows.errors import FlowError
from flows.server import answers


def deploy_all(root: Path) -> list[str]:
    """Make the work pools and deployments of prefect.yaml; say how to start a worker.

    Raises
    ------
    FlowError
        If no server is configured, or it refuses.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise FlowError(
            "PREFECT_API_URL is not set: a schedule needs a server that stays. Start one with "
            "`prefect server start` and set PREFECT_API_URL=http://127.0.0.1:4200/api."
        )
    answers(url)
    deployments = yaml.safe_load((root / "prefect.yaml").read_text())["deployments"]
    pools = sorted({item["work_pool"]["name"] for item in deployments})
    for pool in pools:
        _prefect(root, "work-pool", "create", pool, "--type", "process", "--overwrite")
    _prefect(root, "deploy", "--all")
    lines = []
    for item in deployments:
        crons = ", ".join(schedule["cron"] for schedule in item.get("schedules", ()))
        lines.append(f"{item['name']}: {crons or 'no schedule'}, pool {item['work_pool']['name']}")
    return [*lines, *(f"start a worker here: prefect worker start --pool {p}" for p in pools)]


def _prefect(root: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()
        raise FlowError(f"`prefect {' '.join(arguments)}` failed:\n{said}")
