"""What all stages share: how one starts, how it ends, and how its folder comes into being."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hauberk.allocator import keep_freed_memory
from hauberk.errors import BadParams, CannotLoad, HauberkError, reason_of
from tasks.params import DAVSP, GUARDALIGN, TGA, Params
from tasks.params_file import load_params
from tasks.warm import die_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

T = TypeVar("T")

ARTIFACTS = Path("artifacts")
FRAMES = ARTIFACTS / "frames"
"""Every model's frame once more, in one place: what is tried on other models."""
GUARDS = ARTIFACTS / "guards"
"""The same of every model's GuardAlign: what is tried on models that others serve."""
DATA = ARTIFACTS / "data"
SCRATCH = Path(".scratch")
BANK = "concept_bank"
"""Stands where the name of a defense would, for the concepts that a CLIP knows."""
INDEX = "text_index"
"""Stands there as well, for the texts that a CLIP finds for pictures."""
NOT_ATTACKED = "not_attacked"
"""Stands in the card of a suite of attacked pictures, with the reason, where there are none."""
GAP = "gap"
"""Stands where the name of a defense would, for the analysis of the undefended model."""


def main(name: str, run: Callable[..., Path], *arguments: str, computes: bool = True) -> None:
    """Run one stage from the shell: ``python -m tasks.NAME ARGUMENT...``.

    An error that a user can cure is one message and status 1.  The receipt, written last, tells
    the flow that the stage ran (and was not restored from a cache).  A stage that computes nothing
    starts without torch.
    """
    die_with_parent()
    keep_freed_memory()
    given = sys.argv[1:]
    if len(given) != len(arguments):
        wanted = " ".join(argument.upper() for argument in arguments)
        print(f"usage: python -m tasks.{name} {wanted}", file=sys.stderr)
        raise SystemExit(2)
    try:
        params = load_params()
        if computes:
            prepare_torch(params)
        run(params, *given)
    except HauberkError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if receipts := os.environ.get("STAGE_RECEIPTS"):
        stage = os.environ.get("DVC_STAGE", name)
        Path(receipts, stage).write_text("ran\n")


def prepare_torch(params: Params) -> None:
    """Fix what the bytes of a result depend on: the number of threads and the seed."""
    import torch
    from transformers.utils import logging

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # most stages never import it
    torch.set_num_threads(params.threads)
    torch.manual_seed(params.seed)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def writing(folder: Path, card: dict[str, Any]) -> Iterator[Path]:
    """Make a folder that is complete or not there, card last (see ``hauberk.bundle.replacing``)."""
    from hauberk.files import file_hash, replacing

    with replacing(folder) as partial:
        yield partial
        files = {
            path.relative_to(partial).as_posix(): file_hash(path)
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        write_json({**card, "files": files}, partial / "card.json")


def write_json(content: Any, path: Path) -> Path:
    """Write JSON that is the same bytes for the same content."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return path


def read_json(path: Path) -> Any:
    """Read a file that an earlier stage wrote."""
    if not path.is_file():
        raise BadParams(f"{path} does not exist; run the stage that writes it: `dvc repro`.")
    return json.loads(path.read_text())


def spread(items: Sequence[T], count: int) -> list[T]:
    """Take ``count`` items, or all if there are fewer, at even distances from first to last.

    A suite that is larger than the distance is among samples taken so.
    """
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def code_hash() -> str:
    """Hash the library, so that nothing that older code has begun is gone on with."""
    import hauberk
    from hauberk.files import file_hash

    files = sorted(Path(hauberk.__file__).parent.rglob("*.py"))
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()


def release() -> None:
    """Give back what a model took that was let go of: its cycles, and the memory of a GPU."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def suite_file(model: str, split: str, suite: str) -> Path:
    """Where the samples of a suite lie: with the data, or with the model that was attacked."""
    from hauberk.data.lab import ATTACKED

    if suite in ATTACKED:
        return attacked_folder(model, suite) / f"{split}.parquet"
    return DATA / split / f"{suite}.parquet"


def suites_of(model: str, suites: Sequence[str]) -> list[str]:
    """Of some suites those that a model has: not one of attacked pictures if it has none."""
    from hauberk.data.lab import ATTACKED

    return [
        suite
        for suite in suites
        if suite not in ATTACKED
        or NOT_ATTACKED not in read_json(attacked_folder(model, suite) / "card.json")
    ]


def tested_files(model: str, suites: Sequence[str]) -> list[Path]:
    """Where the samples lie that a model is measured on, of those of ``suites`` that it has."""
    return [suite_file(model, "test", suite) for suite in suites_of(model, suites)]


def attacked_folder(model: str, suite: str) -> Path:
    """Where the pictures lie that were attacked on a model."""
    return ARTIFACTS / model / suite


def bundle_folder(model: str, defense: str) -> Path:
    """Where a defense of a model lies."""
    return ARTIFACTS / model / defense / "bundle"


def clip_folder(clip: str, of: str) -> Path:
    """Where the concept bank of a CLIP lies (``of`` is "bundle"), or what it was measured to do."""
    return ARTIFACTS / clip / BANK / of


def index_folder(clip: str) -> Path:
    """Where the texts lie that a CLIP finds for pictures."""
    return ARTIFACTS / clip / INDEX


def parts_folder(model: str, defense: str = GUARDALIGN) -> Path:
    """Where the parts of a defense lie as they were measured alone."""
    return ARTIFACTS / model / defense / "parts"


def harm_folder(model: str) -> Path:
    """Where the harmfulness vector of a model lies."""
    return ARTIFACTS / model / DAVSP / "harm"


def transfer_folder(model: str) -> Path:
    """Where the frames of other models lie as they were measured on a model."""
    return ARTIFACTS / model / DAVSP / "transfer"


def layers_folder(model: str) -> Path:
    """Where it is told in which layers of a model its refusals live."""
    return ARTIFACTS / model / TGA / "layers"


def evaluation_folder(model: str, defense: str) -> Path:
    """Where its evaluation lies."""
    return ARTIFACTS / model / defense / "evaluation"


def gap_folder(model: str) -> Path:
    """Where the analysis of a model's safety gap lies."""
    return ARTIFACTS / model / GAP


def load_model(params: Params, name: str) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Load a model of params.yaml as it says.

    Raises
    ------
    BadParams
        If the name is unknown, or :func:`hauberk.loading.load_model` cannot load it.
    """
    from hauberk.loading import load_model as load

    if name not in params.models:
        raise BadParams(f"models.{name}: unknown model; known are {', '.join(params.models)}.")
    try:
        return load(params.folder_of(name), **params.models[name].loading)
    except CannotLoad as error:
        raise BadParams(f"models.{name}: {error}") from None


def load_clip(params: Params, name: str) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Load a CLIP of params.yaml, in float32.

    Raises
    ------
    BadParams
        If the name is unknown, or the files are missing or cannot be read.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoProcessor

    spec = params.concept_banks.get(name)
    if spec is None:
        known = ", ".join(params.concept_banks)
        raise BadParams(f"concept_banks.{name}: unknown CLIP; known are {known}.")
    folder = params.folder_of(name)
    try:
        revision = spec.revision or "main"
        model = AutoModel.from_pretrained(
            folder, revision=revision, dtype="float32", use_safetensors=True
        )
        processor = AutoProcessor.from_pretrained(folder, revision=revision)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        # transformers has no error of its own for files that are missing, broken or unknown
        why = reason_of(error)
        raise BadParams(
            f"concept_banks.{name}: {folder} cannot be loaded ({why}); put config, weights, "
            "tokenizer and processor there, or correct params.yaml."
        ) from None
    return model.eval(), processor
