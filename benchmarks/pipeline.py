"""What the order costs when there is nothing to do: ``flows run`` against ``dvc status``."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Ratio, cost, interleaved

AT_MOST = 10.0
"""`dvc status` only looks; the run also finds each version in the registry, holds the candidate
against the gate and prints the table.  Prefect takes no part: where no stage is stale, no flow is
started, unless PREFECT_API_URL names a server that shall hear of it."""


def ratios() -> Iterator[Ratio]:
    """Time a run that finds everything up to date, after one that brings it there if it is not."""
    if not Path("reports/metrics.json").is_file():
        print("no-op pipeline: skipped, run `make demo` first", file=sys.stderr)
        return
    dvc = shutil.which("dvc", path=str(Path(sys.executable).parent)) or "dvc"

    alone = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}

    def call(*command: str) -> None:
        subprocess.run(command, env=alone, check=True, capture_output=True)

    status, run = interleaved(
        [lambda: call(dvc, "status"), lambda: call(sys.executable, "-m", "flows", "run")], 3
    )
    yield cost("no-op pipeline", "dvc status", "all stages unchanged", status, run, AT_MOST)
