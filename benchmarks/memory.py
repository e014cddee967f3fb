"""Peaks of memory above what there was before, in MiB.

``python -m benchmarks.memory answers lab-llava 320 32``: of 320 answers by 32 at once;
``python -m benchmarks.memory prefill calibrated picture``: of reading prompts with GuardAlign's
prefix and a ``picture`` or a long ``query``, which ``plain`` does without looking at it harder;
``python -m benchmarks.memory frame ours``: of a step of DAVSP, or of the authors', ``theirs``;
``python -m benchmarks.memory lesson ours``: of a step of TGA, or of one that runs more at every
step, ``text`` or ``tower``;
``python -m benchmarks.memory search faiss 8``: of searching the index of texts for so many queries,
or with ``product``;
``python -m benchmarks.memory load 10000``: of loading so many pictures.  A process of its own for
each number, because memory that was taken once is not given back.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
_MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Lets glibc give every larger tensor back when it is freed.  By default it learns from what is
freed what to keep, and the same work peaks at 115 or at 180 MiB."""


def peak(work: str, *arguments: object) -> float | None:
    """Measure in a fresh process; None where the system does not tell (it is Linux that does)."""
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", work, *map(str, arguments)]
    # Not capture_output: what the process says of an error shall be seen.
    told = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | _MAPPED
    )
    return float(told.stdout)


def answers(name: str, number: str, batch_size: str) -> Callable[[], object]:
    """Answer so many requests by so many at once."""
    from benchmarks.models import lab
    from hauberk.data.lab import build_suite
    from hauberk.requests import respond

    found = lab(name)
    assert found is not None, f"lab/{name} is not there"
    samples = build_suite("benign_image", "test", int(number), seed=0)
    requests = [sample.request for sample in samples]
    return lambda: respond(*found, requests, max_new_tokens=32, batch_size=int(batch_size))


def prefill(way: str, content: str) -> Callable[[], object]:
    """Read four prompts of a picture of 1600 tokens, or of a query of 1400.

    So long that a bias of all queries on all columns would show, and calibrated in every block,
    because the peak is in the last one: the cache grows from block to block.
    """
    import torch

    from benchmarks.models import llava_shape, pictured
    from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting
    from hauberk.requests import Request, encode

    model, processor = llava_shape(side=560)
    blocks = model.config.text_config.num_hidden_layers
    defense = PrefixAttention(PrefixSetting(layers=tuple(range(blocks))), processor)
    long = [Request("how do i open it ? " * 175)] * 4
    requests = pictured(processor, 4) if content == "picture" else long
    inputs = encode(processor, [defense.rewrite(request) for request in requests])

    @torch.inference_mode()
    def read() -> None:
        with defense.applied(model) if way == "calibrated" else nullcontext():
            model(**inputs, logits_to_keep=1)

    return read


def frame(way: str) -> Callable[[], object]:
    """Take a step of training a frame on harmless requests."""
    from benchmarks.safety_prompt import steps

    theirs, ours, _ = steps(harmful=False)
    return {"theirs": theirs, "ours": ours}[way]


def lesson(way: str) -> Callable[[], object]:
    """Take a step of training a projector and low-rank changes."""
    from contextlib import ExitStack

    from benchmarks.projector import ALIGNMENTS, PARTS, large, stepping

    stack = ExitStack()
    steps = stack.enter_context(stepping(*large(), PARTS["LoRA"], ALIGNMENTS["kl"]))

    def learn() -> None:
        with stack:
            steps[way]()

    return learn


def search(backend: Any, number: str) -> Callable[[], object]:
    """Search the whole index for so many queries; its rows repeat, to be made sooner."""
    from benchmarks.retrieval import NEAREST, repeated

    index, queries = repeated()
    return lambda: index.search(queries[: int(number)], NEAREST, backend)


def load(number: str) -> Callable[[], object]:
    """Load so many pictures, one after the other."""
    from benchmarks.loading import load_pictures

    return load_pictures(number)


def main() -> None:
    """Do one work and print by how much its peak was above what there was before."""
    name, *arguments = sys.argv[1:]
    works: dict[str, Callable[..., Callable[[], object]]] = {
        "answers": answers, "prefill": prefill, "frame": frame, "lesson": lesson,
        "search": search, "load": load,
    }  # fmt: skip
    work = works[name](*arguments)
    before = _mebibytes("VmRSS")
    work()
    print(_mebibytes("VmHWM") - before)


def _mebibytes(name: str) -> float:
    lines = STATUS.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
