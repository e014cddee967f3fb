"""Loading a vision-language model: the one way in, for models of any size.

A model that is larger than one device is spread over several by ``device_map``, or made smaller by
``dtype`` or ``quantization``.  No code of a checkpoint is ever run and nothing is unpickled: only
safetensors are read, by the classes of transformers.  What cannot be loaded is one error that says
what is missing and what to do.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.checkpoint import NEEDED, WEIGHTS, misfit, missing_in
from hauberk.errors import CannotLoad, reason_of

Quantization = Literal["4bit", "8bit"]
DeviceMap = str | Mapping[str, int | str]

DTYPES = ("auto", "float32", "bfloat16", "float16")
""" "auto" is what the checkpoint is stored in."""
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of accelerate to spread a model over all devices there are."""
_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: DeviceMap | None = None,
    quantization: Quantization | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model and its processor, ready to answer.

    Parameters
    ----------
    path : a folder, or an id of the Hugging Face hub
    revision : a commit, tag or branch of the hub; of a folder it says nothing
    dtype : one of DTYPES; of what is not quantized
    device_map : where the parts go: "auto" and the other ways of accelerate, one device such as
        "cuda:0" or "cpu", or a mapping from modules to devices; None for the CPU
    quantization : "4bit" (NF4 with double quantization: Dettmers et al., "QLoRA", 2023) or "8bit"
        (the same authors' "LLM.int8()", 2022), by bitsandbytes
    attn_implementation : "eager", "sdpa", "flash_attention_2"; None for what transformers prefers

    Raises
    ------
    CannotLoad
        If an argument is none of these, a library or device is missing that it needs, or the
        checkpoint is missing, gated, incomplete, damaged, of another kind of model, or needs code
        of its own.
    """
    _check_dtype(dtype)
    _check_devices(device_map)
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = _quantized(quantization, dtype)
        device_map = device_map or "auto"
    if device_map is not None:
        options["device_map"] = device_map
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    where = Path(path).expanduser()
    if where.is_dir():
        _check_folder(where)
        name = str(where)
    elif _HUB_ID.fullmatch(str(path)):
        name = str(path)
    else:
        raise CannotLoad(f"{path}: no such folder; {_put(path)}.")
    common = {"revision": revision or "main", "trust_remote_code": False}
    _check_kind(name, common)
    return _loaded(name, common, {"dtype": dtype, **options})


# --- arguments --------------------------------------------------------------------------------


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise CannotLoad(f"dtype {dtype!r} is unknown; known are {', '.join(DTYPES)}.")


def _check_devices(device_map: DeviceMap | None) -> None:
    if device_map is None:
        return
    if find_spec("accelerate") is None:
        raise CannotLoad(
            f"device_map {device_map!r} needs accelerate, which is not installed; "
            "`pip install accelerate`, or leave device_map out."
        )
    for device in [device_map] if isinstance(device_map, str) else device_map.values():
        if device in (*_SPREADS, "disk"):
            continue
        try:
            found = torch.device(device)
        except RuntimeError:
            raise CannotLoad(
                f"device_map {device!r} is unknown; known are {', '.join(_SPREADS)}, and devices "
                "such as cpu and cuda:0."
            ) from None
        there = _count(found.type)
        if (found.index or 0) >= there:
            raise CannotLoad(
                f"device_map names {device!r}, but there are {there} devices of type "
                f"{found.type}; name one that is there, or 'cpu'."
            )


def _count(kind: str) -> int:
    if kind == "cpu":
        return 1
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def _quantized(quantization: str, dtype: str) -> Any:
    if quantization not in ("4bit", "8bit"):
        raise CannotLoad(f"quantization {quantization!r} is unknown; known are 4bit, 8bit.")
    if find_spec("bitsandbytes") is None:
        raise CannotLoad(
            f"quantization {quantization!r} needs bitsandbytes, which is not installed; "
            "`pip install bitsandbytes`, or leave quantization out and say dtype 'bfloat16'."
        )
    if not torch.accelerator.is_available():
        raise CannotLoad(
            f"quantization {quantization!r} needs a GPU, and none is visible; check "
            "CUDA_VISIBLE_DEVICES and the driver, or leave quantization out."
        )
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )


# --- what is there ----------------------------------------------------------------------------


def _put(path: str | Path) -> str:
    return (
        f"put {', '.join(NEEDED)} into a folder and give its path, or where there is a network "
        f"run `hf download {path}` and bring the folder here"
    )


def _check_folder(folder: Path) -> None:
    missing = missing_in(folder)
    if missing:
        pickled = next(folder.glob("*.bin"), None) if WEIGHTS in missing else None
        cure = (
            f"; {pickled.name} is a pickle, which is not read: convert it to safetensors"
            if pickled
            else "; download the model again, or correct the path"
        )
        raise CannotLoad(f"{folder}: missing {', '.join(missing)}{cure}.")


def _check_kind(name: str, common: Mapping[str, Any]) -> None:
    """Refuse what is no vision-language model of transformers, before any weight is read."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name, **common)
        wrong = misfit(config)
    except Exception as error:  # transformers has no error of its own for files that are broken
        raise _explained(name, common, error) from error
    if wrong:
        raise CannotLoad(f"{name}: {wrong}")


# --- loading ----------------------------------------------------------------------------------


def _loaded(
    name: str, common: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[PreTrainedModel, ProcessorMixin]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        both: Any = AutoModelForImageTextToText.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **common, **options
        )
        model, info = both
        processor = AutoProcessor.from_pretrained(name, **common)
    except Exception as error:
        raise _explained(name, common, error) from error
    if missing := sorted(info["missing_keys"]):
        raise CannotLoad(
            f"{name}: {len(missing)} weights are missing, {missing[0]!r} first, and would be "
            "random; download the model again, or correct config.json."
        )
    if unused := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{name}: the model has no place for {len(unused)} of the weights, {unused[0]!r} "
            "first; it may not be what was trained.",
            stacklevel=3,
        )
    if not isinstance(processor, ProcessorMixin):
        raise CannotLoad(
            f"{name}: {type(processor).__name__} reads no text and pictures together; add the "
            "model's processor_config.json or preprocessor_config.json."
        )
    return model.eval(), processor


def _explained(name: str, common: Mapping[str, Any], error: Exception) -> CannotLoad:
    """Say what an error of transformers or the hub means, and what to do."""
    from huggingface_hub import errors

    causes = list(_chain(error))
    told = reason_of(error)

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any_of(errors.GatedRepoError):
        return CannotLoad(
            f"{name}: its authors let only those load it who accepted their terms; accept them at "
            f"https://huggingface.co/{name} and log in with `hf auth login`."
        )
    if any_of(errors.RevisionNotFoundError):
        return CannotLoad(
            f"{name}: it has no revision {common['revision']!r}; give a commit, tag or branch of "
            f"https://huggingface.co/{name}."
        )
    if any_of(errors.RepositoryNotFoundError):
        return CannotLoad(
            f"{name}: neither a folder here nor a model on the hub that you may see; correct the "
            "name, or log in with `hf auth login` if it is private."
        )
    if any_of(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return CannotLoad(
            f"{name}: neither a folder here nor in the cache, and the hub cannot be reached; "
            f"{_put(name)}."
        )
    if any_of(torch.OutOfMemoryError):
        return CannotLoad(
            f"{name}: it does not fit into the memory of the device ({told}); say device_map "
            "'auto' to spread it, dtype 'bfloat16', or quantization '8bit' or '4bit'."
        )
    return CannotLoad(
        f"{name}: cannot be loaded ({type(error).__name__}: {told}); check that its files are "
        "whole and belong together, or download the model again."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
