"""Train lab models from nothing: ``python -m hauberk.lab.train lab-llava``, or ``--all``.

The stages are those of :mod:`hauberk.lab.stages`, or of :mod:`hauberk.lab.clip`; a run that was
interrupted goes on after the last finished one.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hauberk.allocator import keep_freed_memory
from hauberk.lab import clip, stages
from hauberk.lab.trainer import Trainer, kept


@dataclass(frozen=True)
class Course:
    """How one lab model is trained and measured."""

    trainer: type[Trainer]
    recipe: Any
    card: str
    """The module that measures the model and writes its card."""


_VLM_CARD, _CLIP_CARD = "hauberk.evaluation.lab_card", "hauberk.evaluation.clip_card"
COURSES = {
    "lab-llava": Course(stages.VlmTrainer, stages.Recipe(seed=1), _VLM_CARD),
    "lab-qwen": Course(stages.VlmTrainer, stages.Recipe(seed=2), _VLM_CARD),
    "lab-intern": Course(stages.VlmTrainer, stages.Recipe(seed=3), _VLM_CARD),
    "lab-clip": Course(clip.ClipTrainer, clip.Recipe(seed=4), _CLIP_CARD),
}


def save(trainer: Trainer, out: Path) -> None:
    """Write model (float16 on disk, float32 when loaded), processor and recipe card."""
    unfinished = out.with_name(out.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    trainer.model.half().save_pretrained(unfinished)
    trainer.processor.tokenizer.backend_tokenizer.no_padding()  # as if it had never padded a batch
    trainer.processor.save_pretrained(unfinished)
    config = json.loads((unfinished / "config.json").read_text())
    _set_dtype(config, "float32")  # half the size on disk, full precision in use
    (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    finished = {stage: kept(trainer.checkpoint(stage)) for stage in trainer.STAGES}
    *_, last = finished.values()
    recipe = asdict(trainer.recipe)
    del recipe["fast"]
    card = {
        "name": trainer.name,
        "recipe": recipe,
        "products": {stage: said["products"] for stage, said in finished.items()},
        "seconds": {stage: int(said["seconds"]) for stage, said in finished.items()},
        "parameters": trainer.model.num_parameters(),
        "source": json.loads(last["recipe"])["source"],
    }
    (unfinished / "recipe.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m hauberk.lab.train", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(COURSES))
    parser.add_argument("--all", action="store_true", help="every lab model")
    parser.add_argument("--out", type=Path, help="model folder (default: lab/NAME)")
    parser.add_argument("--work", type=Path, help="checkpoints (default: .lab/NAME)")
    parser.add_argument("--seed", type=int, help="another seed than the recipe's")
    parser.add_argument("--until", metavar="stage", help="the last stage (default: all)")
    parser.add_argument("--fast", action="store_true", help="compiled blocks, the fastest products")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = list(COURSES) if options.all else options.names
    if not names or not set(names) <= set(COURSES):
        parser.error(f"name one or more of {', '.join(COURSES)}, or --all")
    if len(names) > 1 and (options.out or options.work):
        parser.error("--out and --work are for one model; leave them out")
    for name in names:
        known = COURSES[name].trainer.STAGES
        if options.until and options.until not in known:
            parser.error(f"the stages of {name} are {', '.join(known)}")
    keep_freed_memory()
    for name in names:
        course = COURSES[name]
        recipe = replace(course.recipe, fast=options.fast)
        if options.seed is not None:
            recipe = replace(recipe, seed=options.seed)
        work = options.work or Path(".lab", name)
        try:
            trainer = course.trainer(name, recipe, work).run(options.until)
        except ValueError as error:
            parser.exit(1, f"error: {error}\n")
        if options.until in (None, trainer.STAGES[-1]):
            out = options.out or Path("lab", name)
            save(trainer, out)
            # As a process of its own: the lab knows nothing of how its models are measured.
            command = [sys.executable, "-m", course.card, name, "--folder", out]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
