"""TGA: one step of training, against steps that compute again what does not change.

Ours runs the captions once before training (``target: reference``) and the vision tower once for
every picture.  Against it: a step that runs the captions through the decoder as well (``target:
current``, as the authors do), and one that runs the tower (``features: 0``).  At the start of a
training all three have the same loss and the same gradients, which is asserted.

What is gained follows from what is run.  A caption and its question are some thirty tokens beside
the 600 of a picture and its question, so that in LLaVA's shape hardly anything is gained by not
running them: by count a hundredth, and in the lab, whose pictures have 64 tokens, a twelfth.  1.4
times would need captions about as long as pictures.  The tower has half as many blocks as the
decoder here; it is a twentieth of the forward pass of a decoder of 7 billion weights.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.measure import Ratio, cost, flops, interleaved, speed_up
from benchmarks.memory import peak
from benchmarks.models import lab, llava_shape, pictured

BLOCKS = 8
ANSWER = "to make it , take some wood and shape it . " * 4
CAPTION = "a photo of a red box on the table ."
TOKENS = 48
REPEATS = 2
KEPT = 2**31
APART = 1e-5
"""How far gradients may lie apart, as a part of the largest entry, so that all do the same."""
WITHOUT_TEXT = 1.4
"""Times that a step without the captions' runs is to be faster."""
ALIGNMENTS: Mapping[str, Mapping[str, Any]] = {
    "kl": {"layers": (BLOCKS - 1,), "form": "kl"},
    "exp": {"layers": (2, 3, 4), "form": "exp"},
}
"""The last block, and those at the authors' depth of so many."""
PARTS: Mapping[str, Mapping[str, Any]] = {"LoRA": {"mode": "lora"}, "projector": {}}
WAYS: Mapping[str, tuple[str, int]] = {
    "ours": ("reference", KEPT), "text": ("current", KEPT), "tower": ("reference", 0),
}  # fmt: skip
"""Whose text run is aligned with, and how many bytes of features are kept."""

Step = Callable[[], tuple[float, Mapping[str, Any]]]
"""Gives the loss and its gradient by every trained weight."""


def ratios() -> Iterator[Ratio]:
    """Measure time, arithmetic and memory, then the lab's own batches."""
    shape = "1 answered + 2 captioned lessons, 576 image tokens"
    setting = large()
    for part in PARTS:
        for form in ALIGNMENTS:
            what = f"a step of TGA, {part}, {form}"
            with stepping(*setting, PARTS[part], ALIGNMENTS[form]) as steps:
                yield from _against_both(what, shape, steps)
    yield from _memory(shape)
    found = lab("lab-llava")
    if found is None:
        print("a step of TGA, lab-llava: skipped, lab/lab-llava is not there", file=sys.stderr)
        return
    last = found[0].config.text_config.num_hidden_layers - 1
    alignment = {"layers": (last,), "form": "kl"}
    with stepping(*found, _lessons(found[1], 12, 28), PARTS["LoRA"], alignment) as steps:
        shape = "12 answered + 28 captioned lessons, 64 image tokens"
        yield from _against_both("a step of TGA, lab-llava, LoRA, kl", shape, steps)


def large() -> tuple[Any, Any, Sequence[Any]]:
    """Make a LLaVA with 576 image tokens, its processor, and the lessons of a step."""
    import torch

    model, processor = llava_shape(blocks=BLOCKS)
    for weight in model.parameters():
        if weight.ndim > 1:  # what is said next is to depend on what is seen
            torch.nn.init.normal_(weight, std=0.08)
    return model, processor, _lessons(processor, 1, 2)


def _lessons(processor: Any, answered: int, captioned: int) -> Sequence[Any]:
    from hauberk.defenses.projector_step import Lesson

    requests = pictured(processor, answered + captioned)
    told = [Lesson(request, answer=ANSWER) for request in requests[:answered]]
    return told + [Lesson(request, caption=CAPTION) for request in requests[answered:]]


@contextmanager
def stepping(
    model: Any,
    processor: Any,
    lessons: Sequence[Any],
    part: Mapping[str, Any],
    alignment: Mapping[str, Any],
) -> Iterator[dict[str, Step]]:
    """Make every way of the same step, forwards and backwards, at the start of a training."""
    import torch

    from hauberk.defenses.alignment import AlignmentSetting
    from hauberk.defenses.projector import Part
    from hauberk.defenses.projector_step import ProjectorLoss
    from hauberk.defenses.projector_training import ProjectorTraining, _trainable

    last = max(alignment["layers"]) if part.get("mode") == "lora" else None
    with _trainable(model, Part(**part, last=last), ProjectorTraining()) as student:
        student.set(student.start)

        def way(target: Any, features: int) -> Step:
            aligned = AlignmentSetting(**alignment, target=target)
            loss = ProjectorLoss(model, processor, aligned, features=features)
            rows = loss.prepare(lessons, TOKENS)
            with torch.no_grad():
                loss._shown(rows)  # from here on what is kept of the features is there

            def step() -> tuple[float, Mapping[str, Any]]:
                with student.inside():
                    found = loss(rows, 0.0).loss
                    found.backward()
                return found.item(), student.gradients

            return step

        yield {name: way(*told) for name, told in WAYS.items()}


def _against_both(what: str, shape: str, steps: Mapping[str, Step]) -> Iterator[Ratio]:
    found: dict[str, tuple[float, Mapping[str, Any]]] = {}
    counts: dict[str, float] = {}

    def counted(name: str) -> None:
        found[name] = steps[name]()

    for name in steps:
        counts[name] = flops(lambda name=name: counted(name)) / 1e9  # type: ignore[misc]
    for name in ("text", "tower"):
        _same(f"{what}, {name}", *found["ours"], *found[name])
    ours, text, tower = interleaved(list(steps.values()), REPEATS)
    for name, baseline, slow, at_least in (
        ("text", "captions run at every step", text, WITHOUT_TEXT),
        ("tower", "the tower run at every step", tower, 1.0),
    ):
        yield speed_up(what, baseline, shape, slow, ours, at_least)
        plain, least = counts[name], counts["ours"]
        work = f"{what}: arithmetic"
        yield cost(work, baseline, shape, plain, least, round(1 / at_least, 2), "GFLOP")


def _same(
    what: str, loss: float, gradients: Mapping[str, Any], other: float, others: Mapping[str, Any]
) -> None:
    assert abs(loss / other - 1) <= 1e-5, f"{what}: losses {loss} and {other}"
    assert gradients.keys() == others.keys(), f"{what}: gradients of other weights"
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        apart = (gradient - others[name]).abs().max().item() / largest
        assert apart <= APART, f"{what}, {name}: gradients lie {apart:.1e} of the largest apart"


def _memory(shape: str) -> Iterator[Ratio]:
    ours, text, tower = (peak("lesson", way) for way in WAYS)
    if ours is None or text is None or tower is None:
        print("TGA, memory: skipped, /proc/self/status is not there", file=sys.stderr)
        return
    what = "a step of TGA, LoRA, kl: peak"
    yield cost(what, "captions run at every step", shape, text, ours, 1.1, "MiB")
    yield cost(what, "the tower run at every step", shape, tower, ours, 1.1, "MiB")
