"""Reading and changing block outputs: exactly there, in this order, and no longer than asked."""

import pytest
import torch
from torch import nn

from hauberk.anatomy import anatomy_of
from hauberk.hooks import editing, recording, run_to
from hauberk.requests import encode


class Pair(nn.Module):
    """A block of the old kind: it returns a tuple that starts with the states."""

    def forward(self, states):
        return states + 1, "weights of attention"


class Plain(nn.Module):
    """A block of the new kind: it returns the states."""

    def forward(self, states):
        return states + 1


def run(blocks, states):
    for block in blocks:
        states = block(states)
        states = states[0] if isinstance(states, tuple) else states
    return states


def hooks_of(blocks):
    return [len(b._forward_hooks) + len(b._forward_pre_hooks) for b in blocks]


@pytest.mark.parametrize("kind", [Plain, Pair])
def test_the_next_block_sees_the_edit(kind):
    blocks = [kind(), kind(), kind()]
    with editing(blocks, {1: lambda states: states * 10}):
        assert run(blocks, torch.zeros(1)).item() == (1 + 1) * 10 + 1
    assert run(blocks, torch.zeros(1)).item() == 3


def test_the_rest_of_a_tuple_is_passed_on():
    block = Pair()
    with editing([block], {0: lambda states: states * 2}):
        states, rest = block(torch.ones(1))
    assert (states.item(), rest) == (4, "weights of attention")


@pytest.mark.parametrize("kind", [Plain, Pair])
def test_a_recording_shows_what_the_next_block_sees_whichever_comes_first(kind):
    blocks = [kind(), kind()]
    edit = {0: lambda states: states - 5}
    with recording(blocks, torch.clone) as outer, editing(blocks, edit):
        with recording(blocks, torch.clone) as inner:
            run(blocks, torch.zeros(1))
    assert [[kept.item() for kept in block] for block in outer] == [[-4], [-3]]
    assert inner == outer


def test_each_pass_is_recorded_and_only_what_was_asked_to_keep():
    blocks = [Plain(), Plain()]
    with recording(blocks, lambda states: states[:, -1].clone()) as seen:
        for length in (2, 5, 1):
            run(blocks, torch.arange(length, dtype=torch.float).unsqueeze(0))
    run(blocks, torch.zeros(1, 1))  # no longer
    assert [[kept.item() for kept in block] for block in seen] == [[2, 5, 1], [3, 6, 2]]


def test_edits_of_nested_blocks_all_act_the_inner_one_first():
    blocks = [Plain()]
    with editing(blocks, {0: lambda states: states * 2}):
        with editing(blocks, {0: lambda states: states + 10}):
            assert run(blocks, torch.zeros(1)).item() == (1 + 10) * 2
        assert run(blocks, torch.zeros(1)).item() == 2


@pytest.mark.parametrize("where", ["body", "edit", "index"])
def test_nothing_stays_behind_after_an_error(where):
    blocks = [Plain(), Plain()]

    def fail(_):
        raise RuntimeError("on purpose")

    edits = {0: fail if where == "edit" else torch.neg, (9 if where == "index" else 1): torch.neg}
    with pytest.raises((RuntimeError, IndexError)):
        with editing(blocks, edits), recording(blocks, torch.clone):
            run(blocks, torch.zeros(1))
            raise RuntimeError("on purpose")
    assert hooks_of(blocks) == [0, 0]
    assert run(blocks, torch.zeros(1)).item() == 2


@torch.no_grad()
def test_a_recording_of_a_model_equals_its_hidden_states_but_for_the_final_norm(any_tiny):
    inputs = encode(any_tiny.processor, any_tiny.plain[:2])
    blocks = anatomy_of(any_tiny.model).blocks
    with recording(blocks, torch.clone) as seen:
        shown = any_tiny.model(**inputs, output_hidden_states=True).hidden_states
    for index in range(len(blocks) - 1):
        assert torch.equal(seen[index][0], shown[index + 1])
    assert not torch.allclose(seen[-1][0], shown[-1])
    norm = anatomy_of(any_tiny.model).decoder.norm
    torch.testing.assert_close(norm(seen[-1][0]), shown[-1])


@pytest.mark.parametrize("kind", [Plain, Pair])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_run_to_a_block_returns_what_it_puts_out_and_runs_none_after_it(kind, last):
    blocks = [kind(), kind(), kind()]
    with recording(blocks, torch.clone) as seen:
        states = run_to(blocks[last], lambda: run(blocks, torch.zeros(1)))
    assert states.item() == last + 1
    assert [len(kept) for kept in seen] == [int(index <= last) for index in range(3)]
    assert hooks_of(blocks) == [0, 0, 0]
    assert run(blocks, torch.zeros(1)).item() == 3


def test_a_run_to_a_block_shows_it_as_edited_and_passes_gradients():
    blocks, start = [Plain(), Plain()], torch.zeros(1, requires_grad=True)
    with editing(blocks, {0: lambda states: states * 10}):
        states = run_to(blocks[0], lambda: run(blocks, start))
    assert states.item() == 10
    assert torch.autograd.grad(states.sum(), start)[0].item() == 10


def test_a_run_that_does_not_reach_its_block_is_an_error_and_leaves_nothing():
    blocks, other = [Plain()], Pair()
    with pytest.raises(RuntimeError, match="did not reach the Pair to stop at"):
        run_to(other, lambda: run(blocks, torch.zeros(1)))
    assert hooks_of([*blocks, other]) == [0, 0]


def test_an_error_on_the_way_to_a_block_comes_out_as_it_is_and_leaves_nothing():
    blocks = [Plain(), Plain()]

    def fail(_):
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"), editing(blocks, {0: fail}):
        run_to(blocks[1], lambda: run(blocks, torch.zeros(1)))
    assert hooks_of(blocks) == [0, 0]


def test_a_run_to_a_block_of_a_model_is_the_beginning_of_a_whole_one(any_tiny):
    inputs = encode(any_tiny.processor, any_tiny.pictured[:2])
    model, blocks = any_tiny.model, anatomy_of(any_tiny.model).blocks
    with torch.no_grad(), recording(blocks, torch.clone) as seen:
        logits = model(**inputs).logits
    for index, block in enumerate(blocks):
        with torch.no_grad():
            assert torch.equal(run_to(block, lambda: model(**inputs)), seen[index][0])
    with torch.no_grad():
        shown = model(**inputs, output_hidden_states=True)
        assert torch.equal(shown.logits, logits)
        # What stopped while transformers collected states of its own left none of them behind.
        states = run_to(blocks[1], lambda: model(**inputs, output_hidden_states=True))
        again = model(**inputs, output_hidden_states=True).hidden_states
        assert len(again) == len(blocks) + 1
        assert torch.equal(states, again[2])
