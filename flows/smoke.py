"""Load a version as a downstream service does, and ask one request with and without it.

``python -m flows.smoke models:/cmrm.lab-llava/3 lab/lab-llava`` runs in a process of its own, so
that nothing which is loaded here already helps; it prints one line of JSON.
"""

import json
import sys
import time
import warnings
from importlib import metadata
from typing import Any

QUESTION = "What is in the picture?"
SIDE = 96
TOKENS = 16
SHOWN = 200
PACKAGES = ("torch", "transformers")


def smoke(uri: str, model_path: str, revision: str = "main", dtype: str = "auto") -> dict[str, Any]:
    """Download a version, load it, and answer one request with it and without.

    Parameters
    ----------
    uri : str
        ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
    model_path, revision, dtype : str
        What `from_pretrained` loads; from this machine only.
    """
    from registry.store import import_quietly

    start = time.monotonic()
    folder = import_quietly("mlflow.artifacts").download_artifacts(uri)

    from transformers import AutoModelForImageTextToText, AutoProcessor

    import hauberk

    here: dict[str, Any] = {"revision": revision, "local_files_only": True}
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=dtype, **here)
    processor = AutoProcessor.from_pretrained(model_path, **here)
    defense = hauberk.load(folder, model.eval(), processor)
    asked = [hauberk.Request(text=QUESTION, images=[_picture()])]
    plain = hauberk.respond(model, processor, asked, max_new_tokens=TOKENS)
    defended = hauberk.respond(model, processor, asked, defense, max_new_tokens=TOKENS)
    if len(plain) != 1 or len(defended) != 1:
        raise RuntimeError(f"asked one request, got {len(plain)} and {len(defended)} answers")
    return {
        "ok": True,
        "uri": uri,
        "model": f"{model_path}@{revision}",
        "packages": {package: metadata.version(package) for package in PACKAGES},
        "without": _shown(plain[0]),
        "with": _shown(defended[0]),
        "seconds": round(time.monotonic() - start, 2),
    }


def _picture() -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).ellipse((24, 24, 72, 72), fill="red")
    return image


def _shown(answer: object) -> str:
    return str(getattr(answer, "text", answer))[:SHOWN]


def main() -> None:
    """Print what was seen; what a user can cure is one message and status 1."""
    from hauberk.errors import HauberkError

    warnings.simplefilter("ignore")  # standard error is for what went wrong
    try:
        print(json.dumps(smoke(*sys.argv[1:5])))
    except HauberkError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
