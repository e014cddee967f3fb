"""Answers, shifts and defended answers, each against the plain way."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.measure import Ratio, cost, interleaved, speed_up
from benchmarks.models import lab, llava_shape

REPEATS = 5
REQUESTS = 64


def ratios() -> Iterator[Ratio]:
    """Time everything that has to do with answers, one ratio after another."""
    from hauberk.data.lab import build_suite

    model, processor = lab()
    samples = build_suite("benign_image", "test", REQUESTS, seed=0)
    requests = [sample.request for sample in samples]
    yield _batched_respond(model, processor, requests)
    yield _shift_estimation(model, processor, requests)
    yield _dataset_level(model, processor, requests)
    yield from _sample_level()


def _batched_respond(model: Any, processor: Any, requests: list[Any]) -> Ratio:
    from hauberk.requests import respond

    def loop() -> None:
        for request in requests:
            respond(model, processor, [request], max_new_tokens=32)

    def batched() -> None:
        respond(model, processor, requests, max_new_tokens=32)

    slow, fast = interleaved([loop, batched], 3)
    return speed_up("respond", "a loop of single requests", "64 answers", slow, fast, 5)


def _shift_estimation(model: Any, processor: Any, requests: list[Any]) -> Ratio:
    from hauberk.analysis.twins import last_states
    from hauberk.defenses.shift import estimate_shift, sample_shifts
    from hauberk.requests import blank_twin, text_twin

    def loop() -> None:
        for request in requests:
            last_states(model, processor, [text_twin(request)])
            last_states(model, processor, [blank_twin(request, processor)])

    def batched() -> None:
        estimate_shift(sample_shifts(model, processor, requests))

    slow, fast = interleaved([loop, batched], 3)
    return speed_up("shift estimation", "two passes a sample", "64 anchors", slow, fast, 5)


def _dataset_level(model: Any, processor: Any, requests: list[Any]) -> Ratio:
    """Time the prompt and a fixed number of tokens, so that both sides do the same work."""
    import torch

    from hauberk.defenses.shift import Shift, ShiftSetting, estimate_shift, sample_shifts
    from hauberk.requests import encode

    setting = ShiftSetting(compose="incremental")
    defense = Shift(estimate_shift(sample_shifts(model, processor, requests)), setting)
    inputs = encode(processor, requests)
    fixed = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}

    @torch.inference_mode()
    def plain() -> None:
        model.generate(**inputs, **fixed)

    def defended() -> None:
        with defense.applied(model):
            plain()

    without, with_defense = interleaved([plain, defended], 9)
    return cost(
        "generation with CMRM, dataset level", "undefended", "64 x 24 tokens",
        without, with_defense, 1.05,
    )  # fmt: skip


def _sample_level() -> Iterator[Ratio]:
    """Time one prefill at 576 image tokens: undefended, ours, and three plain prefills."""
    import torch

    from hauberk.data.lab import build_suite
    from hauberk.defenses.shift import Shift, ShiftSetting
    from hauberk.requests import blank_twin, encode, text_twin

    model, processor = llava_shape()
    armoured, _ = llava_shape()  # the same weights, so that both stand ready side by side
    samples = build_suite("text_image", "test", 4, seed=0)
    side = processor.image_processor.crop_size["height"]
    requests = [
        replace(s.request, images=(s.image.resize((side, side)),)) for s in samples if s.image
    ]
    twins = [[text_twin(r) for r in requests], [blank_twin(r, processor) for r in requests]]
    inputs, *others = (encode(processor, batch) for batch in (requests, *twins))
    setting = ShiftSetting(level="sample", compose="incremental")
    shift = Shift(torch.zeros(8, 256), setting, processor)

    @torch.inference_mode()
    def plain() -> None:
        model(**inputs, logits_to_keep=1)

    @torch.inference_mode()
    def defended() -> None:
        armoured(**inputs, logits_to_keep=1)

    @torch.inference_mode()
    def three() -> None:
        for batch in (*others, inputs):
            model(**batch, logits_to_keep=1)

    # Open throughout, as a service keeps it: the cache of the blank image is made once.
    with shift.applied(armoured):
        one, ours, naive = interleaved([plain, defended, three], REPEATS)
    shape = f"{len(requests)} prompts, 576 image tokens"
    yield cost("prefill with CMRM, sample level", "undefended", shape, one, ours, 1.2)
    yield speed_up(
        "prefill with CMRM, sample level", "three plain prefills", shape, naive, ours, 1.5
    )
