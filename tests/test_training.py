"""What every training shares: where it goes on after a kill, what it keeps, what it deals."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from hauberk.defenses.training import Checkpoint, Deck, State, key_of, train


@dataclass(frozen=True)
class Schedule:
    steps: int = 7
    validate_every: int = 3


START = {"one": torch.linspace(-1, 1, 5), "two": torch.ones(2, 2)}


def move(state):
    """Steps that depend on all of the state: values, means, squares and number."""
    for name, value in state.trained.items():
        state.means[name] = 0.9 * state.means[name] + value.sin()
        state.squares[name] = 0.5 * state.squares[name] + value**2
        value -= 0.1 * state.step * state.means[name] / (1 + state.squares[name].sqrt())
    state.history.append({"step": state.step})


def judged(trained):
    return {name: value.half() for name, value in trained.items()}, -trained["one"].norm().item()


def run(path=None, key="a", schedule=None, judge=judged, progress=lambda _: None, **more):
    checkpoint = path and Checkpoint(path, key, **more)
    return train(START, move, judge, schedule or Schedule(), checkpoint, progress)


def flat(state):
    """All that a state holds, as plain data."""
    kinds = ("trained", "means", "squares", "best")
    tensors = [
        (kind, name, str(value.dtype), value.tolist())
        for kind in kinds
        for name, value in sorted(getattr(state, kind).items())
    ]
    return tensors, state.step, state.best_step, state.validated, state.history


def same(one, other):
    return flat(one) == flat(other)


class Killed(Exception):
    """Stands for a signal."""


def dying(after):
    finished = []

    def progress(steps):
        finished.append(steps)
        if sum(finished) >= after:
            raise Killed

    return progress


@pytest.mark.parametrize("after", range(1, 8))
def test_a_killed_run_goes_on_after_its_last_validation_to_the_same_bits(tmp_path, after):
    path, finished = tmp_path / "deep" / "state.safetensors", []
    with pytest.raises(Killed):
        run(path, progress=dying(after))
    assert same(run(path, progress=finished.append), run())
    assert finished[0] == (after if after == 7 else after // 3 * 3)
    assert sum(finished) == 7
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_it_begins_with_stays_as_it_was():
    before = {name: value.clone() for name, value in START.items()}
    run()
    assert all(torch.equal(value, before[name]) for name, value in START.items())


def test_the_start_every_so_many_steps_and_the_end_are_validated_and_the_earliest_best_is_kept():
    scores = iter([1.0, 3.0, 3.0, 2.0])
    seen = []

    def judge(trained):
        seen.append({name: value.clone() for name, value in trained.items()})
        return seen[-1], next(scores)

    found = run(judge=judge)
    assert found.validated == {0: 1.0, 3: 3.0, 6: 3.0, 7: 2.0}
    assert found.best_step == 3
    assert found.best is seen[1]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_checkpoint_that_is_cut_short_or_of_another_run_is_begun_anew(tmp_path, share):
    path = tmp_path / "state.safetensors"
    whole = run(path)
    content, finished = path.read_bytes(), []
    run(path, key="b", progress=finished.append)
    assert finished[0] == 0
    path.write_bytes(content[: int(share * len(content))])
    assert Checkpoint(path, "a").resumed() is None
    assert same(run(path), whole)
    assert same(Checkpoint(path, "a").resumed(), whole)


def test_of_several_processes_one_alone_writes(tmp_path):
    path = tmp_path / "state.safetensors"
    run(path, writes=False)
    assert not path.exists()
    run(path)
    assert Checkpoint(path, "a", writes=False).resumed().step == 7


def test_values_are_kept_with_their_dtypes(tmp_path):
    values = {"x": torch.tensor([1.5, -2.0])}
    state = replace(State.begun(values), best={"x": torch.tensor([3], dtype=torch.uint8)}, step=2)
    checkpoint = Checkpoint(tmp_path / "state.safetensors", "a")
    checkpoint.keep(state)
    assert same(checkpoint.resumed(), state)


# --- keys -------------------------------------------------------------------------------------


def test_a_key_tells_everything_apart_that_a_run_depends_on():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    given = [
        ("a", [one, two]),
        ("b", [one, two]),
        ("a", [two, one]),
        ("a", [one, None, two]),
        ("a", [None, one, two]),
        ("a", [one.bfloat16(), two]),
        ("a", [one.view(2, 1), two]),
        ("a", [torch.tensor([1.0, 2.0 + 2.0**-22]), two]),
        ("a", [one.long(), two]),
        ("a", [torch.tensor([2**24]), two]),
        ("a", [torch.tensor([2**24 + 1]), two]),  # equal once they are float32
        ("a", [torch.empty(0), one, two]),
    ]
    assert len({key_of(*each) for each in given}) == len(given)
    assert key_of("a", [one.clone(), two.repeat(2)[:1]]) == key_of("a", [one, two])


# --- decks ------------------------------------------------------------------------------------


def test_what_is_dealt_follows_from_seed_and_place_alone():
    dealt = Deck(range(5), "0").deal(0, 20)
    assert Deck(range(5), "0").deal(8, 4) == dealt[8:12]
    assert Deck(range(5), "1").deal(0, 20) != dealt


def test_every_item_is_dealt_once_before_any_of_them_again_each_time_in_another_order():
    rounds = [tuple(Deck(range(5), "0").deal(5 * number, 5)) for number in range(4)]
    assert all(Counter(each) == Counter(range(5)) for each in rounds)
    assert len(set(rounds)) == 4


def test_of_no_items_none_are_dealt():
    assert Deck([], "0").deal(3, 4) == []
