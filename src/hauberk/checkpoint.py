"""What a checkpoint consists of on disk, told without torch: it is asked before a run."""

import json
from collections.abc import Iterator
from pathlib import Path

from hauberk.errors import CannotLoad

WEIGHTS = "weights (*.safetensors)"
NEEDED = {
    "config.json": ("config.json",),
    WEIGHTS: ("*.safetensors",),
    "a tokenizer (tokenizer.json, or what its class reads)": (
        "tokenizer.json", "*.model", "vocab.*", "tekken.json",
    ),
    "a processor (processor_config.json or preprocessor_config.json)": (
        "processor_config.json", "preprocessor_config.json",
    ),
}  # fmt: skip
"""What a checkpoint consists of, and the files of which one has to be there."""


def missing_in(folder: Path) -> list[str]:
    """Name what a checkpoint lacks; nothing if it is whole, everything if there is no folder.

    Raises
    ------
    CannotLoad
        If the index of its weights cannot be read.
    """
    missing = [
        what
        for what, patterns in NEEDED.items()
        if not any(next(folder.glob(pattern), None) for pattern in patterns)
    ]
    return [*missing, *_missing_shards(folder)]


def _missing_shards(folder: Path) -> Iterator[str]:
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CannotLoad(
                f"{index}: no index of weights can be read from it; download it again."
            ) from None
        yield from sorted(name for name in names if not (folder / name).is_file())
