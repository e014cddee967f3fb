"""The flow: what Prefect shows of it, what is retried, what a failure leaves undone."""

import pytest

from flows.driver import driving
from flows.errors import RunFailed

SHIFT = "estimate_shift@toy-cmrm"


@pytest.fixture
def flow(api, monkeypatch):
    """Run stages of a toy through Prefect and give what its server knows of the tasks."""
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from flows.pipeline import run_with_prefect

    def run(toy, *, delays=(0.0, 0.0)):
        with driving(toy.root) as driver:
            names = driver.graph.select([])
            return run_with_prefect(driver, names, api, record=None, delays=delays).states

    return run


def shown(api) -> dict[str, tuple[str, str, int]]:
    """Give name -> state, type and number of attempts of the newest flow run's tasks."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        newest = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)[0]
        only = FlowRunFilter(id={"any_": [newest.id]})
        tasks = client.read_task_runs(flow_run_filter=only)
        states = {t.name.rsplit("-", 1)[0]: t for t in tasks}
        found = {n: (t.state_name, t.state_type.value, t.run_count) for n, t in states.items()}
    return found | {"flow": (newest.state_name, newest.state_type.value, newest.run_count)}


def test_the_server_shows_which_stages_ran_and_which_did_not(flow, built, api):
    built.set("alpha: 1", "alpha: 2")
    assert flow(built) == {
        "prepare_data": "Skipped",
        SHIFT: "Completed",
        "evaluate_undefended@toy": "Skipped",
        "evaluate@toy-cmrm": "Skipped",
        "compare": "Skipped",
    }
    assert built.ran() == [SHIFT]


def test_only_a_transient_failure_is_tried_again(flow, toy):
    toy.order("prepare_data", exit=75, times=2)
    assert set(flow(toy).values()) == {"Completed"}
    assert toy.ran().count("prepare_data") == 3
    toy.set("seed: 0", "seed: 1")
    toy.order("prepare_data", exit=1, times=2, error="no")
    with pytest.raises(RunFailed, match="no"):
        flow(toy)
    assert toy.ran() == ["prepare_data"]


def test_a_transient_failure_that_stays_fails_after_its_attempts(flow, toy):
    toy.order("prepare_data", exit=75, times=9)
    with pytest.raises(RunFailed, match="exit status 75"):
        flow(toy)
    assert toy.ran() == ["prepare_data"] * 3


def test_a_failure_closes_what_needs_it_and_nothing_else(flow, toy, api):
    toy.order(SHIFT, error="alpha is 1;\nwrite 2.", exit=1)
    with pytest.raises(RunFailed) as failed:
        flow(toy)
    text = str(failed.value)
    assert f"{SHIFT} failed (exit status 1): alpha is 1;\nwrite 2." in text
    assert f"log: logs/{SHIFT}.log" in text
    assert "not run: compare, evaluate@toy-cmrm" in text
    assert sorted(toy.ran()) == [SHIFT, "evaluate_undefended@toy", "prepare_data"]
    assert set(flow(toy).values()) == {"Skipped", "Completed"}


def test_states_reach_the_server(flow, toy, api):
    toy.order(SHIFT, error="no", exit=1)
    with pytest.raises(RunFailed):
        flow(toy)
    states = shown(api)
    assert states["flow"][1] == "FAILED"
    assert states["prepare_data"][:2] == ("Completed", "COMPLETED")
    assert states[SHIFT][1] == "FAILED"
    assert states["evaluate@toy-cmrm"][:2] == ("Skipped: upstream failed", "FAILED")


def deployed(toy, api, **parameters):
    """Call the flow as a worker does."""
    code = f"from flows.pipeline import pipeline; print(pipeline(**{parameters!r}))"
    return toy.python(code, PREFECT_API_URL=api)


def test_the_flow_of_a_deployment_checks_the_parameters_before_it_sets_the_profile(toy, api):
    toy.set("seed: 0", "seed: high")
    done = deployed(toy, api, profile="full")
    assert done.returncode != 0
    assert "seed: expected a whole number, found 'high'" in done.stderr
    assert "profile: quick" in (toy.root / "params.yaml").read_text()
    assert toy.ran() == []


def test_the_flow_of_a_deployment_leaves_the_profile_of_a_run_that_goes_on(toy, api):
    with driving(toy.root):
        done = deployed(toy, api, profile="full")
    assert "another run owns this project" in done.stderr
    assert "profile: quick" in (toy.root / "params.yaml").read_text()


def test_the_flow_of_a_deployment_promotes_only_where_it_is_told_to(built, api):
    built.set("promote: {}", "promote: {toy: cmrm}")
    built.set("at_most: 0.2", "at_most: 0.01")
    with_promotion = deployed(built, api, profile="full")
    assert with_promotion.returncode != 0
    assert "text_image unsafe_rate at most 0.01" in with_promotion.stderr
    without = deployed(built, api, profile="full", promote=False)
    assert without.returncode == 0, without.stderr
    assert "profile: full" in (built.root / "params.yaml").read_text()
