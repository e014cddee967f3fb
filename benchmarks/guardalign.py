"""GuardAlign: transport against POT's, detection's share, and what looking at the prefix costs."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.measure import Ratio, cost, interleaved, speed_up
from benchmarks.memory import peak
from benchmarks.models import NAMES, lab, lab_clip, llava_shape, pictured

REPEATS = 7
REQUESTS = 64
PATCHES, CATEGORIES, VARIANTS = 36, 20, 5
EPSILON = 0.02
ITERATIONS = 30
"""Of ours, whose number is fixed.  POT ends by itself: its loop after 40 to 60, its batch after 20
to 30."""
OFTEN = 10
"""How often a batch is solved while the loop runs once, so that all take long enough to time."""
APART = 1e-6
"""How far the costs of plans may lie apart, so that all solvers did the same."""
THRESHOLD = -2.83
"""Masks about a sixth of these patches; whether it is more or less takes hardly any time."""


def ratios() -> Iterator[Ratio]:
    """Measure both halves of GuardAlign, one ratio after another."""
    yield from _transport()
    yield from _detection()
    for name in NAMES:
        found = lab(name)
        if found is None:
            print(f"{name}: skipped, lab/{name} is not there", file=sys.stderr)
            continue
        # A prompt of the lab is so short that the prefix makes it a quarter longer.
        yield from _prefix(name, *found, _benign(), f"{REQUESTS} x 24 tokens", None)
    model, processor = llava_shape()
    shape = "4 x 24 tokens, 576 image tokens"
    yield from _prefix("LLaVA's shape", model, processor, pictured(processor, 4), shape, 1.1)
    yield from _memory()


def _benign() -> list[Any]:
    from hauberk.data.lab import build_suite

    return [sample.request for sample in build_suite("benign_image", "test", REQUESTS, seed=0)]


def _transport() -> Iterator[Ratio]:
    """Solve one problem a picture with a concept a category, then as printed one a category."""
    import torch
    from torch.nn.functional import normalize

    def unit(*shape: int) -> torch.Tensor:
        """Make directions whose cosines spread by 0.044, those of a CLIP by 0.045."""
        return normalize(torch.randn(*shape, 512, dtype=torch.float64), dim=-1)

    torch.manual_seed(0)
    costs = 1 - unit(REQUESTS, PATCHES) @ unit(CATEGORIES * VARIANTS).T
    costs = costs.unflatten(2, (CATEGORIES, VARIANTS))
    yield from _solvers("transport, joint", costs[..., 0].contiguous())
    yield from _solvers("transport, per category", costs.transpose(1, 2).flatten(0, 1))


def _solvers(what: str, costs: Any) -> Iterator[Ratio]:
    import numpy as np
    import ot
    import torch
    from ot.batch import solve_batch

    from hauberk.defenses.transport import sinkhorn

    rows, columns = (torch.full_like(costs.sum(d), 1 / costs.shape[3 - d]) for d in (2, 1))
    arrays = [tensor.numpy() for tensor in (rows, columns, costs)]

    def loop() -> Any:
        return [ot.sinkhorn(*problem, EPSILON) for problem in zip(*arrays, strict=True)]

    def batch() -> Any:
        return solve_batch(costs, EPSILON, rows, columns, method="log_sinkhorn").plan

    def ours() -> Any:
        return sinkhorn(costs, rows, columns, epsilon=EPSILON, iterations=ITERATIONS)

    spent = [(np.asarray(way()) * arrays[2]).sum((1, 2)) for way in (loop, batch, ours)]
    apart = np.ptp(spent, axis=0).max()
    assert apart <= APART, f"{what}: costs of plans lie {apart:.1e} apart"
    ways = [loop, lambda: _often(batch), lambda: _often(ours)]
    slow, batched, fast = interleaved(ways, REPEATS)
    batched, fast = batched / OFTEN, fast / OFTEN
    number, *sides = costs.shape
    shape = f"{number} of {' x '.join(map(str, sides))}, float64; {ITERATIONS} iterations: costs "
    shape += f"within {APART:g}"
    yield speed_up(what, "ot.sinkhorn one by one", shape, slow, fast, 10)
    yield speed_up(what, "ot.batch, log_sinkhorn", shape, batched, fast, 1)


def _often(way: Callable[[], object]) -> None:
    for _ in range(OFTEN):
        way()


def _detection() -> Iterator[Ratio]:
    """Tell what part of a guarded answer it is to look for unsafe patches.

    Not one to expect elsewhere: lab-clip is as large as the model that it guards, and encodes five
    crops of every picture.
    """
    from dataclasses import asdict

    from hauberk.concepts import build_bank
    from hauberk.data.concepts import lab_concepts
    from hauberk.defenses.guardalign import GuardAlign
    from hauberk.defenses.patch_transport import PatchTransport, TransportSetting
    from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting
    from hauberk.requests import respond

    found, clip = lab("lab-llava"), lab_clip()
    if found is None or clip is None:
        print("detection: skipped, lab/lab-llava or lab/lab-clip is not there", file=sys.stderr)
        return
    bank = build_bank(*clip, **asdict(lab_concepts()))
    transport = PatchTransport(*clip, bank, TransportSetting(threshold=THRESHOLD))
    guard = GuardAlign(transport, PrefixAttention(PrefixSetting(), found[1]))
    requests = _benign()
    images = [image for request in requests for image in request.images]

    def answer() -> None:
        respond(*found, requests, guard, max_new_tokens=32)

    whole, part = interleaved([answer, lambda: transport.masked(images)], REPEATS)
    yield cost(
        "detection's share, lab-llava", "answers with GuardAlign", f"{len(images)} pictures",
        whole, part, None,
    )  # fmt: skip


def _prefix(
    name: str, model: Any, processor: Any, requests: list[Any], shape: str, at_most: float | None
) -> Iterator[Ratio]:
    """Time the calibration, and prefix and calibration together, which are to cost ``at_most``."""
    from hauberk.defenses.guardalign import GuardAlign
    from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting
    from hauberk.requests import encode

    guard = GuardAlign(None, PrefixAttention(PrefixSetting(), processor))
    plain, prefixed = (encode(processor, r) for r in (requests, guard.rewrite_all(requests)))

    def answer(inputs: Any) -> None:
        model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)

    def guarded() -> None:
        with guard.applied(model):
            answer(prefixed)

    undefended, told, ours = interleaved(
        [lambda: answer(plain), lambda: answer(prefixed), guarded], REPEATS
    )
    yield cost(f"calibration, {name}", "the same prompts", shape, told, ours, 1.1)
    yield cost(f"prefix and calibration, {name}", "undefended", shape, undefended, ours, at_most)


def _memory() -> Iterator[Ratio]:
    """Compare peaks where few queries stand behind the prefix, and where nearly all of them do.

    A bias of all queries on all columns would make them 1.4 and more.
    """
    lengths = {"picture": "1600 image tokens", "query": "1400 tokens of query"}
    for content, length in lengths.items():
        plain, ours = (peak("prefill", way, content) for way in ("plain", "calibrated"))
        if plain is None or ours is None:
            print("calibration, memory: skipped, /proc/self/status is not there", file=sys.stderr)
            return
        what, shape = "calibration of every block: peak", f"4 prompts, {length}"
        yield cost(what, "the same prompts", shape, plain, ours, 1.1, "MiB")
