"""DAVSP: one step of training a frame, against the way the authors' code takes it.

A LLaVA of 40 blocks with 576 image tokens, so narrow that a CPU trains on it, of which block 20 is
scored.  Theirs: batches of one in a loop, all blocks with every hidden state, two passes for a
request whose answer counts, and its text padded to 1,024 tokens.  Both give the same gradient.

Of a model of 13B attention is a far smaller part, so that less is gained: by count 2.7 times for a
harmless request with an answer of 100 tokens, and 1.6 times for a harmful one.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.measure import Ratio, cost, flops, interleaved, speed_up
from benchmarks.memory import peak
from benchmarks.models import llava_shape, pictured

BLOCKS, WIDTH = 40, 64
LAYER = 19
"""Counted from 0: the 20th of 40."""
REQUESTS = 2
"""In a batch, as in the authors' script."""
PADDED = 1024
ANSWER = "to make it , take some wood and shape it . " * 4
TOKENS = 48
WEIGHT = 0.02
REPEATS = 2
APART = 2e-6
"""How far the gradients may lie apart, as a part of the largest entry, so that both do the same."""


def ratios() -> Iterator[Ratio]:
    """Measure time, arithmetic and memory of a step on harmless requests, and on harmful ones."""
    for harmful, at_least, at_most in ((False, 5.0, 0.2), (True, 1.2, 0.8)):
        kind = "harmful" if harmful else "harmless"
        what, shape = f"a step of DAVSP, {kind}", f"{REQUESTS} requests, 576 image tokens"
        theirs, ours, floor = steps(harmful)
        _same(what, theirs, ours)
        slow, fast = interleaved([theirs, ours], REPEATS)
        yield speed_up(what, "the authors' step", shape, slow, fast, at_least)
        counts = [flops(way) / 1e9 for way in (theirs, ours)]
        yield cost(f"{what}: arithmetic", "the authors' step", shape, *counts, at_most, "GFLOP")
        name = "one pass without waste"
        yield cost(f"{what}: arithmetic", name, shape, floor / 1e9, counts[1], 1.1, "GFLOP")
    plain, ours_peak = (peak("frame", way) for way in ("theirs", "ours"))
    if plain is None or ours_peak is None:
        print("DAVSP, memory: skipped, /proc/self/status is not there", file=sys.stderr)
        return
    what, shape = "a step of DAVSP, harmless: peak", f"{REQUESTS} requests, 576 image tokens"
    yield cost(what, "the authors' step", shape, plain, ours_peak, 0.5, "MiB")


Step = Callable[[], tuple[float, Any]]
"""Gives the loss and its gradient."""


def steps(harmful: bool) -> tuple[Step, Step, float]:
    """Make both ways of the same step, and count what the least arithmetic for it is.

    The answers to harmful requests do not count, as in 95 of 100 batches of the authors.
    """
    import torch

    from hauberk.analysis.harmfulness import HarmAxis
    from hauberk.defenses.safety_prompt import Geometry
    from hauberk.defenses.safety_prompt_step import Case, FrameLoss, Goal

    model, processor = llava_shape(blocks=BLOCKS, width=WIDTH)
    for weight in model.parameters():
        weight.requires_grad_(False)
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.08)
    geometry = Geometry(336, 336, (28, 28, 28, 28))
    along = torch.randn(WIDTH)
    goal = Goal(HarmAxis(LAYER, along / along.norm(), 0.0), 27.0, -27.0, WEIGHT)
    loss = FrameLoss(model, processor, geometry, goal)
    requests = pictured(processor, REQUESTS)
    requests[0] = replace(requests[0], text=f"{requests[0].text} take your time .")
    cases = [Case(request, harmful, ANSWER) for request in requests]  # of two lengths
    rows = loss.prepare(cases, TOKENS)
    frame = torch.rand(3, 336, 336)

    def ours() -> tuple[float, Any]:
        found = loss(frame, rows, [not harmful] * len(rows))
        return found.loss, found.gradient

    def theirs() -> tuple[float, Any]:
        return _authors(loss, frame, rows, answered=not harmful)

    return theirs, ours, sum(_least(model, row, answered=not harmful) for row in rows)


def _authors(loss: Any, frame: Any, rows: Sequence[Any], *, answered: bool) -> tuple[float, Any]:
    """Take a step as train/optimize.py does, but for the frame itself, which is ours."""
    import torch
    from torch.nn.functional import cross_entropy, pad

    model, goal = loss.model, loss.goal
    frame = frame.clone().requires_grad_()
    total = torch.zeros(())
    for row in rows:  # the loss of the scores
        fed = loss._fed(loss.canvas(frame, [row]))
        ids = row.prompt["input_ids"][None]
        states = model(input_ids=ids, **fed, use_cache=False, output_hidden_states=True)
        score = goal.axis.score(states.hidden_states[goal.axis.layer + 1][0, -1])
        hinge = goal.high - score if row.harmful else score - goal.low
        total = total + hinge.clamp(min=0) / len(rows)
    for row in rows if answered else ():  # the loss of the answers
        fed = loss._fed(loss.canvas(frame, [row]))
        ids = torch.cat([row.prompt["input_ids"], row.answer])
        length = PADDED + model.config.image_seq_length - 1
        ids = pad(ids, (0, length - len(ids)))[None]
        logits = model(input_ids=ids, **fed, use_cache=False).logits.float()
        first = len(row.prompt["input_ids"])
        labels = torch.full_like(ids[0], -100)
        labels[first : first + len(row.answer)] = row.answer
        total = total + goal.answer_weight * cross_entropy(logits[0, :-1], labels[1:]) / len(rows)
    (gradient,) = torch.autograd.grad(total, frame)
    return total.item(), gradient


def _same(what: str, theirs: Step, ours: Step) -> None:
    (loss, gradient), (our_loss, our_gradient) = theirs(), ours()
    apart = ((gradient - our_gradient).abs().max() / gradient.abs().max()).item()
    assert abs(our_loss / loss - 1) <= 1e-5, f"{what}: losses {loss} and {our_loss}"
    assert apart <= APART, f"{what}: gradients lie {apart:.1e} of the largest entry apart"


def _least(model: Any, row: Any, *, answered: bool) -> float:
    """Count the arithmetic of one pass of one request and of its gradient by the pixels.

    No padding, every block that counts once, the head at the answer alone, and for every product of
    matrices forward one back (two in attention, neither of whose sides is a weight), but for
    those that lead to text alone.
    """
    text, eyes = model.config.text_config, model.config.vision_config
    patches = (eyes.image_size // eyes.patch_size) ** 2
    answer = len(row.answer) if answered else 0
    tokens = len(row.prompt["input_ids"]) + answer
    blocks = text.num_hidden_layers if answered else LAYER + 1

    def products(length: int, width: int, inner: int, gates: int) -> float:
        """Of one block: of weights, and of attention, which is half of the work each."""
        weights = 2 * length * (4 * width**2 + (gates + 2) * width * inner)
        return 2 * weights + 3 * 4 * length**2 * width

    seen = eyes.num_hidden_layers * products(
        patches + 1, eyes.hidden_size, eyes.intermediate_size, 0
    )
    cut = 2 * 2 * patches * 3 * eyes.patch_size**2 * eyes.hidden_size
    shown = 2 * 2 * patches * (eyes.hidden_size + text.hidden_size) * text.hidden_size
    read = blocks * products(tokens, text.hidden_size, text.intermediate_size, 1)
    said = 2 * 2 * answer * text.hidden_size * text.vocab_size
    return float(seen + cut + shown + read + said)
