"""Train lab models from nothing: ``python -m hauberk.lab.train lab-llava``, or ``--all``.

The stages are those of :mod:`hauberk.lab.stages`; a run that was interrupted goes on after the
last finished one.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hauberk.lab.stages import STAGES, Classroom, Recipe, kept, run_stages

_STEPS = {"pretrain": 1300, "align": 1500, "tower": 3600, "projector": 300, "instruct": 3000}
_PEAK_RATE = {"pretrain": 1e-2, "align": 6e-3, "tower": 1e-2, "projector": 1e-2, "instruct": 4e-3}

RECIPES = {
    "lab-llava": Recipe(seed=1, steps=_STEPS, peak_rate=_PEAK_RATE, questions=0.75),
    "lab-qwen": Recipe(seed=2, steps=_STEPS, peak_rate=_PEAK_RATE, questions=0.75),
    "lab-intern": Recipe(seed=3, steps=_STEPS, peak_rate=_PEAK_RATE, questions=0.75),
}


def save(room: Classroom, name: str, out: Path) -> None:
    """Write model (float16 on disk, float32 when loaded), processor and recipe card."""
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    room.model.half().save_pretrained(partial)
    room.processor.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    _set_dtype(config, "float32")  # half the size on disk, full precision in use
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    card = {
        "name": name,
        "recipe": asdict(room.recipe)
        | {"fast": {s: json.loads(kept(room.checkpoint(s))["fast"]) for s in STAGES}},
        "parameters": room.model.num_parameters(),
        "source": json.loads(kept(room.checkpoint(STAGES[-1]))["recipe"])["source"],
    }
    (partial / "recipe.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m hauberk.lab.train", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(RECIPES))
    parser.add_argument("--all", action="store_true", help="every lab model")
    parser.add_argument("--out", type=Path, help="model folder (default: lab/NAME)")
    parser.add_argument("--work", type=Path, help="checkpoints (default: .lab/NAME)")
    parser.add_argument("--seed", type=int, help="another seed than the recipe's")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    parser.add_argument("--fast", action="store_true", help="bfloat16 products, compiled decoder")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = list(RECIPES) if options.all else options.names
    if not names or not set(names) <= set(RECIPES):
        parser.error(f"name one or more of {', '.join(RECIPES)}, or --all")
    if len(names) > 1 and (options.out or options.work):
        parser.error("--out and --work are for one model; leave them out")
    for name in names:
        recipe = replace(RECIPES[name], fast=options.fast)
        if options.seed is not None:
            recipe = replace(recipe, seed=options.seed)
        try:
            room = run_stages(name, recipe, options.work or Path(".lab", name), options.until)
        except ValueError as error:
            parser.exit(1, f"error: {error}\n")
        if options.until == STAGES[-1]:
            out = options.out or Path("lab", name)
            save(room, name, out)
            # As a process of its own: the lab knows nothing of how its models are measured.
            measure = "hauberk.evaluation.lab_card"
            subprocess.run([sys.executable, "-m", measure, name, "--folder", out], check=True)


if __name__ == "__main__":
    main()
