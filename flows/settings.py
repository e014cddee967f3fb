"""Settings of the tools, made before they are imported: offline, silent, inside the project.

Each is a default: what the user has set in the environment stays.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from flows.locks import MARK

DEFAULTS = {
    # Nothing leaves the machine.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A dead server is said at once; a pickle is not opened.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # POT imports every array library it finds, torch among them.
    "POT_BACKEND_DISABLE_JAX": "1",
    "POT_BACKEND_DISABLE_TENSORFLOW": "1",
    "POT_BACKEND_DISABLE_CUPY": "1",
    # A person sees our own lines; Prefect's go to its server.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "GIT_PYTHON_REFRESH": "quiet",
}

WARM = "STAGE_WARM"
"""Names to a stage the socket of the process that it forks from; see tasks.warm, which has it once
more, because the commands of a project start before its stages can be imported."""


def apply_defaults(root: Path) -> None:
    """Set what the user has not set."""
    for name, value in {**DEFAULTS, "PREFECT_HOME": str(root.resolve() / ".prefect")}.items():
        os.environ.setdefault(name, value)


def stage_environment(receipts: Path, run: str) -> dict[str, str]:
    """Give the environment of a stage.

    Parameters
    ----------
    receipts : Path
        Where a stage that ran leaves its receipt.
    run : str
        The mark by which a later run finds what this one left behind, see `locks`.
    """
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    more: Mapping[str, str] = {
        # dvc runs a command through $SHELL; only bash replaces itself by a single command, so
        # that the stage is the child of dvc and ends with it.
        "SHELL": "/bin/bash",
        "PATH": programs,
        "STAGE_RECEIPTS": str(receipts),
        "PYTHONUNBUFFERED": "1",
        MARK: run,
    }
    return {**os.environ, **more}
