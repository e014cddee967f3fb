"""A defense on disk: data files and a card, hashed and bound to one model.

``card.json`` says what the bundle is, what it was fitted on and for which model it was made, and
holds the sha256 of every other file and of itself.  Reading verifies, in this order: the card,
every hash, that nothing else lies in the folder, and the binding; only then is a tensor used.
Bundles are data: nothing is unpickled, nothing is executed, and no path leaves the folder.
"""

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.errors import BadBundle, TamperedBundle, WrongModel
from hauberk.files import file_hash, replacing

CARD = "card.json"
SCHEMA = 2
"""1 knew of the tokenizer the vocabulary alone, and nothing of the config."""


@dataclass(frozen=True)
class Binding:
    """What a bundle was made for.

    ``model`` and ``revision`` tell a person where the weights came from; the other five are
    compared when a bundle is loaded.
    """

    model: str
    revision: str | None
    architecture: str
    config: str
    weights: str
    chat_template: str
    processor: str


@dataclass(frozen=True)
class Card:
    """A bundle's identity."""

    method: str
    binding: Binding
    parameters: Mapping[str, Any]
    data: list[dict[str, str]]
    """What the defense was fitted on: ids and hashes."""
    measurements: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    hauberk: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages that it was made with; empty for bundles from before this was recorded."""
    schema: int = SCHEMA


def binding_of(model: PreTrainedModel, processor: ProcessorMixin) -> Binding:
    """Identify a loaded model and its processor."""
    return Binding(
        model=str(model.config.name_or_path),
        revision=getattr(model.config, "_commit_hash", None),
        architecture=type(model).__name__,
        config=_text_hash(_canonical(_lasting(model.config.to_dict())).decode()),
        weights=fingerprint(model),
        chat_template=_text_hash(processor.chat_template or processor.tokenizer.chat_template),
        processor=_text_hash(_canonical(_processor_state(processor)).decode()),
    )


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Hash all of a model's weights: every tensor's name, shape and values.

    Values are read as bfloat16, so that a checkpoint has one fingerprint whether it is loaded in
    float32 or bfloat16; a change that bfloat16 rounds away goes unseen.  One core took 0.7 s
    for a GiB of bfloat16 and 2.3 s for one of float32; tensors are hashed side by side.
    """
    tensors = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        hashes = pool.map(_tensor_hash, (tensor for _, tensor in tensors))
        lines = [
            f"{name} {tuple(tensor.shape)} {found}"
            for (name, tensor), found in zip(tensors, hashes, strict=True)
        ]
    return _text_hash("\n".join(lines))


@torch.no_grad()
def _tensor_hash(tensor: Tensor) -> str:
    values = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
    return hashlib.sha256(values.numpy().data).hexdigest()


def versions() -> dict[str, str]:
    """The packages that a number depends on, with the versions that run now."""
    import transformers

    from hauberk import __version__

    return {
        "hauberk": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def write_bundle(
    folder: Path,
    card: Card,
    write_files: Callable[[Path], None],
    extra_files: Mapping[str, str] | None = None,
) -> Path:
    """Write a bundle so that it is either complete or not there.

    ``write_files`` puts the data files into the folder it is given; ``extra_files`` are texts by
    name.  The hashes of all are added to the card, which is written last.
    """
    with replacing(folder) as partial:
        write_files(partial)
        for name, text in (extra_files or {}).items():
            (partial / name).write_text(text)
        files = {path.name: file_hash(path) for path in sorted(partial.iterdir())}
        made_with = versions()
        content = {**asdict(card), "files": files, "hauberk": made_with["hauberk"]}
        content["versions"] = made_with
        content["card_sha256"] = hashlib.sha256(_canonical(content)).hexdigest()
        (partial / CARD).write_bytes(_canonical(content))
    return folder


def read_card(folder: Path) -> tuple[Path, Card]:
    """Read and verify a bundle's card and files, without looking at any model.

    Parameters
    ----------
    folder : the bundle itself, or a downloaded MLflow model that holds it under ``data/``

    Returns
    -------
    (Path, Card)
        Where the files lie, and the card.

    Raises
    ------
    BadBundle
        If there is no card, or a newer hauberk wrote it.
    TamperedBundle
        If the card or any file differs by one byte, is missing, or was added.
    """
    home = _find(Path(folder))
    raw = (home / CARD).read_bytes()
    content = _verified_card(home, raw)
    for name, expected in content["files"].items():
        path = home / name
        if Path(name).name != name or path.is_symlink():
            raise TamperedBundle(f"{home}: the card names {name!r}, which leaves the folder.")
        found = file_hash(path) if path.is_file() else None
        if found is None or found != expected:
            raise TamperedBundle(
                f"{path}: sha256 expected {expected}, found {found or 'no such file'}; download "
                "the bundle again."
            )
    added = sorted({p.name for p in home.iterdir()} - set(content["files"]) - {CARD})
    if added:
        raise TamperedBundle(
            f"{home}: expected only {sorted(content['files'])} and {CARD}, found also {added}."
        )
    fields = {key: content[key] for key in Card.__dataclass_fields__}
    return home, Card(**fields | {"binding": Binding(**content["binding"])})


def check_binding(card: Card, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Raise :class:`WrongModel`, naming every difference, unless the bundle fits the model."""
    found = asdict(binding_of(model, processor))
    expected = asdict(card.binding)
    compared = ("architecture", "config", "weights", "chat_template", "processor")
    wrong = [
        f"{key}: expected {expected[key]}, found {found[key]}"
        for key in compared
        if expected[key] != found[key]
    ]
    if wrong:
        then, now = card.versions.get("transformers"), versions()["transformers"]
        if then not in (None, now):
            wrong.append(
                f"It was made with transformers {then}, this is {now}, which may tell the same "
                "config or processor otherwise."
            )
        raise WrongModel(
            f"this {card.method} bundle was made for {expected['model']!r}, "
            f"not for {found['model']!r}:\n  "
            + "\n  ".join(wrong)
            + "\nLoad the model it names, or build the defense for this one."
        )


def read_bound(
    folder: Path | str,
    method: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    writer: str,
) -> tuple[Path, Card]:
    """Read and verify a bundle of one method, made for this model: see :func:`read_card`.

    Raises
    ------
    BadBundle, TamperedBundle, WrongModel
        If it is of another method (``writer`` says what writes one of this), was changed, or was
        made for another model.
    """
    home, card = read_card(Path(folder))
    if card.method != method:
        raise BadBundle(
            f"{home}: expected a bundle of method {method!r}, found {card.method!r}; give the "
            f"folder that {writer} wrote."
        )
    check_binding(card, model, processor)
    return home, card


class Bound:
    """Holds models against the binding of a card, each model object once.

    Parameters
    ----------
    card : that of a loaded bundle
    model, processor : what it was loaded for, and held against already
    """

    def __init__(self, card: Card, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.card, self.processor = card, processor
        self._checked = WeakSet([model])

    def check(self, model: PreTrainedModel) -> None:
        """Raise :class:`WrongModel` for another model; later changes of one are not seen."""
        if model not in self._checked:
            check_binding(self.card, model, self.processor)
            self._checked.add(model)


def _find(folder: Path) -> Path:
    inside = [path.parent for path in sorted(folder.glob(f"data/*/{CARD}"))]
    homes = [folder] if (folder / CARD).is_file() else inside
    if len(homes) != 1:
        raise BadBundle(
            f"{folder}: expected a {CARD} here or in exactly one folder below data/, found "
            f"{len(homes)}; give the folder of a bundle or of a downloaded MLflow model."
        )
    return homes[0]


def _verified_card(home: Path, raw: bytes) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(raw)
        recorded = content.pop("card_sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        found = hashlib.sha256(raw).hexdigest()
        raise TamperedBundle(
            f"{home / CARD}: expected a card in JSON with its own hash, found other bytes (sha256 "
            f"{found}); download the bundle again."
        ) from None
    found = hashlib.sha256(_canonical(content)).hexdigest()
    if found != recorded or _canonical({**content, "card_sha256": recorded}) != raw:
        raise TamperedBundle(
            f"{home / CARD}: sha256 expected {recorded}, found {found} (or other spacing); "
            "download the bundle again."
        )
    if content.get("schema", 0) > SCHEMA:
        raise BadBundle(
            f"{home}: the card has schema {content['schema']}, this hauberk reads up to {SCHEMA}; "
            f"install hauberk {content['hauberk']} or newer."
        )
    content.setdefault("versions", {})
    binding = content.get("binding", {})
    missing = [key for key in Card.__dataclass_fields__ if key not in content]
    missing += [f"binding.{key}" for key in Binding.__dataclass_fields__ if key not in binding]
    if missing:
        raise BadBundle(f"{home / CARD}: {missing} are missing; build the bundle again.")
    return content


def _canonical(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, default=str) + "\n").encode()


def _text_hash(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


_VOLATILE = {
    *("architectures", "processor_class", "name_or_path", "transformers_version"),
    *("dtype", "torch_dtype"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
}
"""Of a configuration, what does not change what is computed: names, versions, the precision, which
one loading may choose, and what is handed out besides.  Nor does what begins with _, such as a path
or the implementation of attention."""


def _lasting(state: Any) -> Any:
    """What stays of a configuration, at every depth, wherever and however it was loaded."""
    if not isinstance(state, dict):
        return state
    return {
        str(key): _lasting(value)
        for key, value in state.items()
        if key not in _VOLATILE and not str(key).startswith("_")
    }


def _processor_state(processor: ProcessorMixin) -> dict[str, Any]:
    """Everything that decides what the model is fed, and nothing that names files or versions."""
    images = getattr(processor, "image_processor", None)
    settings = {
        key: value
        for key, value in vars(processor).items()
        if isinstance(value, str | int | float | bool) and key != "chat_template"
    }
    return {
        "images": _lasting(images.to_dict()) if images is not None else {},
        "settings": _lasting(settings),
        "tokenizer": _text_hash(_canonical(_tokenizer_state(processor.tokenizer)).decode()),
    }


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Normalizer, vocabulary, merges and all; but of one that is not fast the vocabulary alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: dict[str, Any] = tokenizer.get_vocab()
        return vocabulary
    state: dict[str, Any] = json.loads(backend.to_str())
    # every call sets these anew
    return {key: value for key, value in state.items() if key not in ("truncation", "padding")}


def _load_pyfunc(path: str) -> "PyfuncDefense":
    """Load a bundle as MLflow's pyfunc flavour does; MLflow calls this with the data folder."""
    return PyfuncDefense(Path(path))


class PyfuncDefense:
    """A promoted defense behind ``mlflow.pyfunc.load_model``: base model and defense together.

    The base model's weights are not in the registry; it is loaded from where the bundle's card
    says, or from ``model_path``, and kept until another path is asked for.  So is the CLIP that
    some defenses look at pictures with, or ``clip_path``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.card = read_card(folder)
        self._loaded: tuple[Any, Any, Any] | None = None
        self._source: tuple[str, str | None] | None = None

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Answer rows with columns ``prompt`` and, optionally, ``image`` (base64).

        Raises
        ------
        ValueError
            If a column or parameter is unknown or missing, or a row, which is named, holds no text
            as prompt or something else than a picture as image.
        """
        import importlib

        requests = importlib.import_module("hauberk.requests")
        known = {"model_path", "clip_path", "max_new_tokens"}
        params = dict(params or {})
        if unknown := sorted(set(params) - known):
            raise ValueError(f"unknown params {unknown}; known are {sorted(known)}.")
        if "prompt" not in model_input:
            raise ValueError(f"column 'prompt' is missing; found {list(model_input)}.")
        asked = [
            requests.Request(_prompt(index, row["prompt"]), _decoded(index, row.get("image")))
            for index, row in enumerate(model_input.to_dict("records"))
        ]
        model, processor, defense = self._load(params.get("model_path"), params.get("clip_path"))
        limit = int(params.get("max_new_tokens", 64))
        answers = requests.respond(model, processor, asked, defense, max_new_tokens=limit)
        return [answer.text for answer in answers]

    def _load(self, model_path: str | None, clip_path: str | None) -> tuple[Any, Any, Any]:
        source = model_path or self.card.binding.model, clip_path
        if self._loaded is None or self._source != source:
            import importlib

            from transformers import AutoModelForImageTextToText, AutoProcessor

            self._loaded = None  # there may be no memory for two
            place, revision = source[0], self.card.binding.revision
            model = AutoModelForImageTextToText.from_pretrained(place, revision=revision).eval()
            processor = AutoProcessor.from_pretrained(place, revision=revision)
            defense = importlib.import_module("hauberk.defenses").load(
                self.folder, model, processor, clip=clip_path
            )
            self._loaded, self._source = (model, processor, defense), source
        return self._loaded


_PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What requests may hold; of other formats some, such as EPS, would run a program to be read."""


def _prompt(row: int, prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"row {row}: prompt is {prompt!r}; give a text.")
    return prompt


def _decoded(row: int, image: Any) -> list[Image.Image]:
    """Read the picture of a row, turned as its EXIF says.

    It is base64, text or bytes; or None, NaN or "" where there is none.
    """
    absent = math.isnan(image) if isinstance(image, float) else image is None
    if absent or (isinstance(image, str) and not image):
        return []
    if not isinstance(image, str | bytes):
        raise ValueError(
            f"row {row}: image is of type {type(image).__name__}; give the bytes of a picture file "
            'in base64, or None, NaN or "" for no picture.'
        )
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(image, validate=True)), formats=_PICTURES)
        picture.load()  # here, where the row is known
        return [ImageOps.exif_transpose(picture)]
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"row {row}: image is no picture in base64: {error}.") from None
