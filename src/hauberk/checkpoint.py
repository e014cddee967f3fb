"""What a checkpoint consists of on disk, told without torch: it is asked before a run."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def misfit(config: Mapping[str, Any]) -> str | None:
    """Say why a config is of no model that transformers has and that reads pictures and text.

    It ends with what to do; None where it is of such a model.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config.get("model_type")
    if not isinstance(kind, str):
        return (
            "its config.json names no model_type, so that nobody knows what it is of; give the "
            "config of a whole model."
        )
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in config:
            return (
                f"{kind!r} needs code that comes with the checkpoint, which is not run here; "
                "choose a conversion to a model of transformers (often NAME-hf), if there is one."
            )
        return (
            f"transformers {transformers.__version__} knows no model_type {kind!r}; install a "
            "newer one, or choose a conversion to a model that it knows."
        )
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        only = "reads text alone" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "is no model"
        return (
            f"{kind!r} {only}, where one that reads pictures and text, and answers in text, would "
            "be right; choose a vision-language model."
        )
    return None
