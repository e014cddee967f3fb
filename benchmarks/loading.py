"""Reading 10,000 pictures: a loader's samples, against Pillow one by one and against `datasets`.

The files are JPEGs of noise that was blown up, 256 x 192, in a folder with a table of JSON lines.
Every way ends with each picture decoded as 8-bit colours.  Looking through all files before the
first sample, hashing each, is part of what is timed.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Ratio, cost, interleaved

PICTURES = 10_000
SIZE = (256, 192)
REPEATS = 3
AT_MOST = {"Pillow, one by one": 2.0, "datasets, load_dataset": 1.5}
"""Neither of them checks or hashes anything; decoding ahead in threads makes up for a part of what
that takes, where a second core is idle."""
OF_ALL = 0.02
"""Of all pictures decoded at once, what may be held."""


def ratios() -> Iterator[Ratio]:
    """Time the ways in turn, then measure memory in a process of its own."""
    from benchmarks.memory import peak

    shape = f"{PICTURES} JPEGs of {SIZE[0]} x {SIZE[1]}"
    with tempfile.TemporaryDirectory() as place:
        folder = made(Path(place), PICTURES)
        plain, theirs, ours = interleaved(
            [lambda: one_by_one(folder), lambda: by_datasets(folder), lambda: loaded(folder)],
            REPEATS,
        )
    for (baseline, at_most), seconds in zip(AT_MOST.items(), (plain, theirs), strict=True):
        yield cost("loading", baseline, shape, seconds, ours, at_most)
    held = peak("load", PICTURES)
    if held is None:
        print("loading, memory: skipped, /proc/self/status is not there", file=sys.stderr)
        return
    whole = PICTURES * SIZE[0] * SIZE[1] * 3 / 2**20
    yield cost("loading: peak", "all pictures decoded", shape, whole, held, OF_ALL, "MiB")


def made(folder: Path, number: int) -> Path:
    """Write the pictures and their table."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    with (folder / "metadata.jsonl").open("w") as table:
        for index in range(number):
            small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            name = f"images/{index:05d}.jpg"
            small.resize(SIZE).save(folder / name, quality=90)
            row = {"question": f"question {index}", "expected": "answer", "reference": "yes"}
            table.write(json.dumps({**row, "image": name}) + "\n")
    return folder


def one_by_one(folder: Path) -> int:
    """Decode in a plain loop."""
    from PIL import Image

    return sum(
        Image.open(folder / json.loads(line)["image"]).convert("RGB").size[0]
        for line in (folder / "metadata.jsonl").open()
    )


def by_datasets(folder: Path) -> int:
    """Let `datasets` read the same table, with files as pictures, and decode row by row."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        rows: Any = datasets.load_dataset(
            "json", data_files=str(folder / "metadata.jsonl"), split="train", cache_dir=cache
        )
        paths = rows.map(lambda row: {"image": str(folder / row["image"])})
        pictures = paths.cast_column("image", datasets.Image(mode="RGB"))
        return sum(row["image"].size[0] for row in pictures)


def loaded(folder: Path) -> int:
    """Load it as a set of one's own."""
    from hauberk.data.sources import load

    return sum(sample.image.size[0] for sample in load("own", folder) if sample.image)


def load_pictures(number: str) -> Callable[[], object]:
    """Make so many, and hand out what loads them: for :mod:`benchmarks.memory`."""
    place = tempfile.TemporaryDirectory()
    folder = made(Path(place.name), int(number))
    loaded(made(Path(tempfile.mkdtemp(dir=place.name)), 2))  # imports, and memory of the decoders

    def load_all() -> None:
        with place:
            loaded(folder)

    return load_all
