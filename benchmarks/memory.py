"""``python -m benchmarks.memory lab-llava 320 32``: the peak of 320 answers by 32 at once, in MiB.

A process of its own for each number, because memory that was taken once is not given back.
"""

import subprocess
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak(name: str, number: int, batch_size: int) -> float | None:
    """Measure in a fresh process; None where the system does not tell (it is Linux that does)."""
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", name, str(number), str(batch_size)]
    # Not capture_output: what the process says of an error shall be seen.
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(told.stdout)


def main() -> None:
    """Answer so many requests and print by how much the peak was above what there was before."""
    from benchmarks.models import lab
    from hauberk.data.lab import build_suite
    from hauberk.requests import respond

    name, number, batch_size = sys.argv[1:]
    found = lab(name)
    assert found is not None, f"lab/{name} is not there"
    samples = build_suite("benign_image", "test", int(number), seed=0)
    requests = [sample.request for sample in samples]
    before = _mebibytes("VmRSS")
    respond(*found, requests, max_new_tokens=32, batch_size=int(batch_size))
    print(_mebibytes("VmHWM") - before)


def _mebibytes(name: str) -> float:
    lines = STATUS.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
