"""Stacks: defenses in the order in which they act."""

from contextlib import contextmanager

import pytest
import torch

from hauberk.defenses import SafetyPrompt, Shift, Stack
from hauberk.defenses.safety_prompt import Geometry
from hauberk.defenses.shift import ShiftSetting, estimate_shift, sample_shifts
from hauberk.requests import respond


class Marking:
    """Writes its mark in front of a request, and tells when it changes a model."""

    method = "marking"

    def __init__(self, mark, log):
        self.mark, self.log = mark, log

    def rewrite(self, request):
        from dataclasses import replace

        return replace(request, text=self.mark + request.text)

    @contextmanager
    def applied(self, model):
        self.log.append(f"+{self.mark}")
        try:
            yield
        finally:
            self.log.append(f"-{self.mark}")


class Together(Marking):
    """Rewrites many at once only."""

    def rewrite_all(self, requests):
        self.log.append(len(requests))
        return [super(Together, self).rewrite(request) for request in requests]


def test_requests_and_model_pass_through_a_stack_from_first_to_last(tiny):
    log = []
    stack = Stack([Marking("a", log), Together("b", log)])
    requests = tiny.plain[:3]
    assert [each.text for each in stack.rewrite_all(requests)] == [
        f"ba{request.text}" for request in requests
    ]
    assert stack.rewrite(requests[0]).text == f"ba{requests[0].text}"
    assert log == [3, 1]
    log.clear()
    with pytest.raises(KeyError), stack.applied(tiny.model):
        raise KeyError
    assert log == ["+a", "+b", "-b", "-a"]


def test_a_stack_answers_as_its_defenses_one_after_the_other(any_tiny):
    tiny = any_tiny
    frame = torch.full((3, 96, 96), 90, dtype=torch.uint8)
    prompt = SafetyPrompt(frame, Geometry(96, 96, (24, 24, 24, 24)), "be safe . ")
    vectors = estimate_shift(sample_shifts(tiny.model, tiny.processor, tiny.pictured))
    shift = Shift(5 * vectors, ShiftSetting(), tiny.processor)
    requests = tiny.pictured + tiny.plain
    made = respond(tiny.model, tiny.processor, requests, Stack([prompt, shift]), max_new_tokens=6)
    rewritten = [prompt.rewrite(request) for request in requests]
    apart = respond(tiny.model, tiny.processor, rewritten, shift, max_new_tokens=6)
    assert [one.text for one in made] == [one.text for one in apart]
    bare = respond(tiny.model, tiny.processor, rewritten, max_new_tokens=6)
    assert [one.text for one in made] != [one.text for one in bare]


def test_a_stack_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a stack of nothing; give one defense or more"):
        Stack([])
