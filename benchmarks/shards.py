"""An evaluation through two processes against the same through one."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Ratio, interleaved, speed_up
from benchmarks.models import LAB

NAME = "lab-llava"
SAMPLES = 2000
"""Enough that answering takes longer than a process takes to start and to load."""
ALIKE, ALL = 1.4, 1.0
"""Twice as many processes can be twice as fast at most, less what starting them takes.  Against
one process that has all threads, they win where its threads wait for each other."""


def ratios() -> Iterator[Ratio]:
    """Time each from the start of the first process to the merged records."""
    import torch

    from hauberk.data.lab import build_suite
    from hauberk.evaluation.shards import FromDisk, evaluate_sharded

    if not (LAB / NAME).is_dir():
        print(f"evaluation of {NAME}: skipped, lab/{NAME} is not there", file=sys.stderr)
        return
    samples = build_suite("benign_image", "test", SAMPLES, seed=0)
    cores = torch.get_num_threads()
    half = max(1, cores // 2)
    answers: dict[tuple[int, int], Any] = {}

    def evaluate(shards: int, threads: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            records = evaluate_sharded(
                FromDisk(LAB / NAME),
                samples,
                shards=shards,
                threads=threads,
                names=(NAME, "none"),
                folder=Path(folder),
                max_new_tokens=32,
                batch_size=64,
            )
        answers[shards, threads] = [record.response for record in records]

    ways = (1, half), (1, cores), (2, half)
    alike, whole, two = interleaved([lambda way=way: evaluate(*way) for way in ways], 1)
    for way, seconds, aim in ((ways[0], alike, ALIKE), (ways[1], whole, ALL)):
        pairs = zip(answers[way], answers[ways[2]], strict=True)
        yield speed_up(
            f"evaluation, {NAME}: 2 processes, threads: {half} each",
            f"1 process, threads: {way[1]}",
            f"{SAMPLES} answers, {sum(a != b for a, b in pairs)} differ",
            seconds,
            two,
            aim,
        )
