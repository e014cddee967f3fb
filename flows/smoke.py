"""Load a version as a downstream service does, and ask one request with and without it.

``python -m flows.smoke models:/cmrm.lab-llava/3 lab/lab-llava`` runs in a process of its own, so
that nothing which is loaded here already helps; it prints one line of JSON.
"""

import json
import sys
import time
from typing import Any

QUESTION = "What is in the picture?"
SIDE = 96
SHOWN = 200


def smoke(uri: str, model_path: str) -> dict[str, Any]:
    """Download a version, load it, and answer one request with it and without.

    Parameters
    ----------
    uri : str
        ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
    model_path : str
        What `from_pretrained` loads.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import hauberk
    from registry.store import import_quietly

    start = time.monotonic()
    folder = import_quietly("mlflow.artifacts").download_artifacts(uri)
    model = AutoModelForImageTextToText.from_pretrained(model_path, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(model_path, local_files_only=True)
    defense = hauberk.load(folder, model, processor)
    asked = [hauberk.Request(text=QUESTION, images=[_picture()])]
    plain = hauberk.respond(model, processor, asked)
    defended = hauberk.respond(model, processor, asked, defense=defense)
    if len(plain) != 1 or len(defended) != 1:
        raise RuntimeError(f"asked one request, got {len(plain)} and {len(defended)} answers")
    return {
        "ok": True,
        "uri": uri,
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


if __name__ == "__main__":
    print(json.dumps(smoke(*sys.argv[1:3])))
