"""Answers, shifts and defended answers of every lab model, each against the plain way."""

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.measure import Ratio, cost, interleaved, speed_up
from benchmarks.memory import peak
from benchmarks.models import NAMES, lab, llava_shape, pictured

REPEATS = 5
REQUESTS = 64
FEW, MANY = 32, 320
ANSWERS: dict[str, Any] = {"max_new_tokens": 32}


def ratios() -> Iterator[Ratio]:
    """Time everything that has to do with answers, one ratio after another."""
    from hauberk.data.lab import build_suite

    for name in NAMES:
        found = lab(name)
        if found is None:
            print(f"{name}: skipped, lab/{name} is not there", file=sys.stderr)
            continue
        samples = build_suite("benign_image", "test", MANY, seed=0)
        requests = [sample.request for sample in samples]
        yield _respond(name, *found, requests[:REQUESTS])
        yield _growth(name, *found, requests)
        yield from _memory(name)
        yield _shift_estimation(name, *found, requests[:REQUESTS])
        yield _dataset_level(name, *found, requests[:REQUESTS])
        if name == "lab-llava":
            yield from _sample_level()


def _respond(name: str, model: Any, processor: Any, requests: list[Any]) -> Ratio:
    from hauberk.requests import encode, respond

    def loop() -> None:
        for request in requests:
            inputs = encode(processor, [request])
            generated = model.generate(**inputs, **ANSWERS, do_sample=False)
            new = generated[:, inputs["input_ids"].shape[1] :]
            processor.batch_decode(new, skip_special_tokens=True)

    def batched() -> None:
        respond(model, processor, requests, **ANSWERS)

    slow, fast = interleaved([loop, batched], 3)
    return speed_up(f"respond, {name}", "model.generate one by one", "64 answers", slow, fast, 5)


def _growth(name: str, model: Any, processor: Any, requests: list[Any]) -> Ratio:
    """Compare ten batches with ten times what one of them takes."""
    from hauberk.requests import respond

    def answer(number: int) -> None:
        respond(model, processor, requests[:number], batch_size=FEW, **ANSWERS)

    one, ten = interleaved([lambda: answer(FEW), lambda: answer(MANY)], 3)
    baseline = f"ten times {FEW} answers"
    return cost(f"respond, {name}", baseline, f"{MANY} answers", 10 * one, ten, 1.1)


def _memory(name: str) -> Iterator[Ratio]:
    batch_size = FEW // 4  # several batches: the first takes less than those after it
    one, ten = (peak("answers", name, number, batch_size) for number in (FEW, MANY))
    if one is None or ten is None:
        print(f"memory of {name}: skipped, /proc/self/status is not there", file=sys.stderr)
        return
    what, shape = f"respond, {name}: peak", f"{MANY} answers"
    yield cost(what, f"{FEW} answers", shape, one, ten, 1.1, "MiB")


def _shift_estimation(name: str, model: Any, processor: Any, requests: list[Any]) -> Ratio:
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
    what = f"shift estimation, {name}"
    return speed_up(what, "two passes a sample", "64 anchors", slow, fast, 5)


def _dataset_level(name: str, model: Any, processor: Any, requests: list[Any]) -> Ratio:
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

    without, with_defense = interleaved([plain, defended], REPEATS)
    return cost(
        f"CMRM, dataset level, {name}", "undefended", "64 x 24 tokens",
        without, with_defense, 1.05,
    )  # fmt: skip


def _sample_level() -> Iterator[Ratio]:
    """Time one prefill at 576 image tokens: undefended, ours, and three plain prefills."""
    import torch

    from hauberk.defenses.shift import Shift, ShiftSetting
    from hauberk.requests import blank_twin, encode, text_twin

    model, processor = llava_shape()
    armoured, _ = llava_shape()  # the same weights, so that both stand ready side by side
    requests = pictured(processor, 4)
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
