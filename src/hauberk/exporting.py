"""Bundles as what other programs read: checkpoints and pictures.

A shift becomes biases and trained weights become weights, so that a checkpoint of stock
transformers answers as the defended model does; a frame becomes a PNG.
"""

from pathlib import Path
from typing import Any

from hauberk.bundle import read_card
from hauberk.defenses import Projector, SafetyPrompt, Shift, load, read
from hauberk.defenses.folding import export_folded
from hauberk.errors import BadParams, UnsupportedRequest
from hauberk.loading import load_model


def export(bundle: Path, source: str, out: Path, **loading: Any) -> Path:
    """Write a bundle for its model as something that is used without hauberk.

    Parameters
    ----------
    bundle : its folder
    source : the model, a folder or a repository; a frame alone needs none, and it is not loaded
    out : what is written, a new folder, or for a frame a new file that ends in .png
    loading : further arguments of :func:`hauberk.loading.load_model`

    Raises
    ------
    BadParams
        If there is something at ``out`` already, or it has no right name.
    UnsupportedRequest
        If nothing but hauberk can do what the defense does, saying why.
    BadBundle, TamperedBundle, WrongModel, CannotLoad, LayerOutOfRange, UnknownFamily
        As loading the two does.
    """
    if out.exists():
        raise BadParams(f"{out}: already there; give another name, or move it away.")
    _, card = read_card(bundle)
    if card.method == SafetyPrompt.method:
        return _picture(read(bundle), out)
    if card.method not in (Shift.method, Projector.method):
        raise UnsupportedRequest(
            f"{bundle}: {card.method} looks at every request before the model does, which no "
            "checkpoint and no picture can; let a service call hauberk.respond."
        )
    model, processor = load_model(source, **loading)
    return _checkpoint(load(bundle, model, processor), model, processor, out)


def _picture(prompt: Any, out: Path) -> Path:
    if prompt.frame is None:
        raise UnsupportedRequest("this bundle holds a prefix and no frame, so there is no picture.")
    if out.suffix.lower() != ".png":
        raise BadParams(f"{out}: a frame is written as a PNG; give a name that ends in .png.")
    part = out.with_name(out.name + ".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        prompt.picture().save(part, "PNG")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return out


def _checkpoint(defense: Any, model: Any, processor: Any, out: Path) -> Path:
    if not isinstance(defense, Projector):
        return export_folded(defense, model, processor, out)
    if defense.retrieved is not None:
        raise UnsupportedRequest(
            "this bundle puts a retrieved text into every prompt, which is no part of any "
            "checkpoint; export it in Python, with defense.with_retrieved(None, None)."
        )
    return defense.export(model, processor, out)
