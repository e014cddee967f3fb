"""What the order costs when there is nothing to do: the whole pipeline against ``dvc status``."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Ratio, cost, interleaved

AT_MOST = 10.0
"""`dvc status` only looks; the pipeline also starts Prefect's server, reads the registry and
prints the table.  The promise to a user is seconds, and stands in the README."""


def ratios() -> Iterator[Ratio]:
    """Time a run that finds everything up to date; it needs a finished `make demo`."""
    if not Path("reports/metrics.json").is_file():
        print("no-op pipeline: skipped, run `make demo` first", file=sys.stderr)
        return
    dvc = shutil.which("dvc", path=str(Path(sys.executable).parent)) or "dvc"

    def call(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    status, run = interleaved(
        [lambda: call(dvc, "status"), lambda: call(sys.executable, "-m", "flows", "run")], 3
    )
    yield cost("no-op pipeline", "dvc status", "all stages unchanged", status, run, AT_MOST)
