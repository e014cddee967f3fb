"""``python -m benchmarks [--json]``: every ratio, measured now, on this machine."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict

from benchmarks.measure import Ratio


def main() -> None:
    """Run all benchmarks and print them as a table, or as JSON lines."""
    import torch
    from transformers.utils import logging

    from benchmarks import (
        generation,
        guardalign,
        loading,
        pipeline,
        projector,
        retrieval,
        safety_prompt,
        shards,
    )
    from hauberk.allocator import keep_freed_memory

    keep_freed_memory()  # as the stages do; it speeds up both sides of a ratio
    logging.disable_progress_bar()
    found: list[Ratio] = []
    works = (
        generation, guardalign, safety_prompt, projector, retrieval, loading, shards, pipeline,
    )  # fmt: skip
    for module in works:
        for ratio in module.ratios():
            found.append(ratio)
            print(f"{ratio.what}: {ratio.value:.2f}, aim {ratio.aim}", file=sys.stderr)
    if "--json" in sys.argv[1:]:
        for ratio in found:
            print(json.dumps(asdict(ratio)))
        return
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}")
    _show(found)


def _show(found: Iterable[Ratio]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="hauberk: each ratio measured in this run")
    for column in ("what", "against", "shape", "baseline", "ours", "ratio", "aim", ""):
        numeric = column in ("baseline", "ours", "ratio")
        table.add_column(column, justify="right" if numeric else "left")
    for ratio in found:
        table.add_row(
            ratio.what,
            ratio.baseline,
            ratio.shape,
            f"{ratio.baseline_cost:.3f} {ratio.unit}",
            f"{ratio.our_cost:.3f} {ratio.unit}",
            f"{ratio.value:.2f}",
            ratio.aim,
            {True: "met", False: "MISSED", None: ""}[ratio.met],
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    main()
