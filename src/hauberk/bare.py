"""A model without weights: built on the meta device from its config alone, in a second or two.

It has every module, name and shape of the real one.  Only configs are read, from a folder, a file
or the hub; code that comes with a model is never run.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_mappings import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from hauberk.checkpoint import misfit
from hauberk.errors import BadModel, reason_of

_CONFIG = "config.json"
_SETTINGS = ("preprocessor_config.json", "processor_config.json")
"""What may hold the settings of an image processor; the second from transformers 5 on."""


@dataclass(frozen=True)
class BareModel:
    """What a config tells of a model."""

    source: str
    model: PreTrainedModel
    images: Any
    """Its image processor; None if none is known."""
    images_from: str
    """Where that was found."""


def bare_model(source: str, revision: str | None = None) -> BareModel:
    """Build a model on the meta device.

    Parameters
    ----------
    source : a folder with a config.json, such a file itself, or the name of a repository on the hub
    revision : of the repository

    Raises
    ------
    BadModel
        If there is no config, it needs code of its own, it is of no model that reads pictures and
        text, or none can be built from it.
    """
    told = _told(source, revision)
    with _errors_alone():
        model = _built(source, told)
        images, found = _images(source, revision, told["model_type"])
    return BareModel(source, model, images, found)


def _told(source: str, revision: str | None) -> dict[str, Any]:
    """Read the config of a model that can be built, but for what only building shows."""
    told = _read(source, revision)
    if wrong := misfit(told):
        raise BadModel(f"{source}: {wrong}")
    classes = told.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise BadModel(
            f"{source}: the architectures of its {_CONFIG} are {classes!r}, where a list of names "
            "of classes would be right; download it again."
        )
    strange = [name for name in classes if not hasattr(transformers, name)]
    if strange:
        raise BadModel(
            f"{source}: it was written for {strange[0]}, which transformers does not have, and its "
            f"config does not describe the {told['model_type']!r} of transformers; choose a "
            "converted checkpoint."
        )
    return told


def _read(source: str, revision: str | None) -> dict[str, Any]:
    path = Path(source).expanduser()
    file = path / _CONFIG if path.is_dir() else path
    if file.is_file():
        return _object(file)
    if path.is_dir():
        raise BadModel(f"{source}: there is no {_CONFIG} in this folder; give that of a model.")
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith(".json"):
        raise BadModel(
            f"{source}: there is no such file or folder; give a folder with a {_CONFIG}, such a "
            "file, or the name OWNER/MODEL of a repository on the hub."
        )
    try:
        found: dict[str, Any] = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    except (OSError, ValueError) as error:
        why = reason_of(error)
        raise BadModel(
            f"{source}: its config cannot be read from the hub ({why}); check the name and the "
            f"connection, or give a folder or a {_CONFIG} that was downloaded."
        ) from None
    if not found:
        raise BadModel(f"{source}: this repository has no {_CONFIG}; check the name.")
    return found


def _object(file: Path) -> dict[str, Any]:
    try:
        told: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(f"{file} is no config in JSON ({error}); download it again.") from None
    if not isinstance(told, dict):
        raise BadModel(f"{file} holds a {type(told).__name__}, where a config is an object.")
    return told


def _built(source: str, told: dict[str, Any]) -> PreTrainedModel:
    try:
        config = CONFIG_MAPPING[told["model_type"]].from_dict(told)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    except Exception as error:
        # configs and models have no error of their own for what they cannot be built from
        why = reason_of(error)
        raise BadModel(
            f"{source}: no {told['model_type']!r} can be built from this config ({why}); download "
            "it again, or install what it asks for."
        ) from None
    return model


def _images(source: str, revision: str | None, name: str) -> tuple[Any, str]:
    """Find the image processor: what comes with the config, or what its model type stands for."""
    path = Path(source).expanduser()
    if not path.is_file():
        settings = _settings(path)
        try:
            found = AutoImageProcessor.from_pretrained(
                source, revision=revision, trust_remote_code=False
            )
            return found, "its own settings"
        except Exception as error:  # image processors have no error of their own for bad settings
            if settings is not None:
                why = reason_of(error)
                raise BadModel(
                    f"{settings}: no image processor can be made from it ({why}); download it "
                    "again, or install what it asks for."
                ) from None
            if not isinstance(error, OSError | ValueError | ImportError | KeyError):
                raise
            # none comes with it: said in what is returned
    kinds = (IMAGE_PROCESSOR_MAPPING_NAMES.get(name) or {}).values()  # of one or two back ends
    default = next((kind for kind in kinds if kind), None)
    if default is None:
        return None, f"none is known for {name!r}"
    kind: Any = get_image_processor_class_from_name(default)
    return kind(), f"the default of {name!r}, as no settings came with the config"


def _settings(folder: Path) -> Path | None:
    """Find the file of a folder that holds the settings of its image processor."""
    for file in (folder / name for name in _SETTINGS):
        if file.is_file():
            told = _object(file)
            if file.name == _SETTINGS[0] or "image_processor" in told:
                return file
    return None


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Keep transformers from warning of what concerns weights and texts, which are not there."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
