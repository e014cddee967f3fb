"""The stage of served models: asked over a real socket, killed, lied to, and never asked twice."""

import json
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
import yaml

from hauberk.bundle import binding_of
from hauberk.data.samples import read_suite
from hauberk.defenses import GuardAlign, SafetyPrompt
from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting
from hauberk.defenses.safety_prompt import Geometry
from hauberk.errors import BadEndpoint, BadParams
from hauberk.evaluation.run import read_records
from hauberk.requests import Request, respond
from tasks import evaluate_served, prepare_data
from tests.serving import completion, failure, last_text, serving
from tests.test_endpoint import PASSING
from tests.test_stages import contents, project, run, start
from tests.test_target import pictures_in

KEY = "sk-of-nobody-0123456789"
FRAMED, GUARDED = "davsp@lab-llava", "guardalign@lab-llava"
DEFENSES = ("none", FRAMED, GUARDED)
SAMPLES = 18
"""Six of each drawn suite; attacked ones are of a model here."""


@pytest.fixture(scope="module")
def fitted(lab_folder, tiny, tmp_path_factory):
    """A project with data, a frame, and words whose attention a served model cannot be given."""
    root = project(tmp_path_factory.mktemp("fitted"), lab_folder)
    run(root, prepare_data)
    binding = binding_of(tiny.model, tiny.processor)
    frame().save(root / "artifacts/frames/lab-llava/bundle", binding, data=[])
    guard(tiny).save(root / "artifacts/guards/lab-llava", binding, data=[])
    return root


def frame():
    seeded = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8, generator=seeded)
    return SafetyPrompt(colours, Geometry(96, 96, (24, 24, 24, 24)), "be safe . ")


def guard(tiny, **setting):
    told = {"text": "be safe . ", "gamma": 0.6} | setting
    return GuardAlign(None, PrefixAttention(PrefixSetting(**told), tiny.processor))


@pytest.fixture
def root(fitted, tmp_path, monkeypatch):
    """A copy in which links stand for what no test changes, and the key in the environment."""
    monkeypatch.setenv("SERVED_KEY", KEY)
    (tmp_path / "artifacts").mkdir()
    for name in ("lab", "artifacts/data", "artifacts/frames", "artifacts/guards"):
        (tmp_path / name).symlink_to(fitted / name)
    (tmp_path / "params.yaml").write_text((fitted / "params.yaml").read_text())
    return tmp_path


def serve_from(root, server, **changes):
    """Let params.yaml name the server, impatient as a test is."""
    endpoint = {
        "url": server.url, "model": "m", "api_key_env": "SERVED_KEY", "concurrency": 4,
        "backoff": 0.01, "timeout": 20.0, "deadline": 60.0, "retries": 2,
        "price_in": 1.0, "price_out": 2.0,
    }  # fmt: skip
    told = {"endpoint": endpoint, "defenses": [FRAMED, GUARDED]}
    path = root / "params.yaml"
    other = changes.pop("other", {})
    content = yaml.safe_load(path.read_text()) | {"served": {"my-api": told | changes}} | other
    path.write_text(yaml.safe_dump(content))


def answering(tiny):
    """What the tiny model says to a request as it arrived."""
    one_at_a_time = threading.Lock()

    def answer(body):
        request = Request(last_text(body), pictures_in(body) if pictured(body) else ())
        with one_at_a_time:
            (said,) = respond(tiny.model, tiny.processor, [request], max_new_tokens=4)
        return said.text

    return answer


def pictured(body):
    return not isinstance(body["messages"][-1]["content"], str)


def found(root, defense):
    folder = root / "artifacts/my-api" / defense / "evaluation"
    card = json.loads((folder / "card.json").read_text())
    assert set(card["files"]) == {"responses.jsonl", "metrics.json", "metrics.parquet"}
    return read_records(folder / "responses.jsonl"), card


@pytest.fixture(scope="module")
def expected(fitted, tiny):
    """Defense -> what the same model answers here under it."""
    suites = ("text", "text_image", "benign_image")
    samples = [
        one for name in suites for one in read_suite(fitted / f"artifacts/data/test/{name}.parquet")
    ]
    defenses = {"none": None, FRAMED: frame(), GUARDED: guard(tiny, gamma=0.0)}
    requests = [sample.request for sample in samples]
    return {
        name: {
            sample.sample_id: said.text
            for sample, said in zip(
                samples, respond(*both(tiny), requests, each, max_new_tokens=4), strict=True
            )
        }
        for name, each in defenses.items()
    }


def both(tiny):
    return tiny.model, tiny.processor


def test_a_served_model_answers_under_every_defense_as_it_does_here(root, tiny, expected):
    answer = answering(tiny)
    with serving(lambda body, count: answer(body)) as server:
        serve_from(root, server, revision="november")
        run(root, evaluate_served, "my-api")
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        host = server.url.removeprefix("http://").removesuffix("/v1")
    assert {path.name for path in (root / "artifacts/my-api").iterdir()} == set(DEFENSES)
    assert len({tuple(said.values()) for said in expected.values()}) == len(DEFENSES)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    for defense in DEFENSES:
        records, card = found(root, defense)
        assert {record.sample_id: record.response for record in records} == expected[defense]
        assert {(record.model, record.defense) for record in records} == {("my-api", defense)}
        told = card["served"]
        assert (told["host"], told["model"], told["revision"]) == (host, "m", "november")
        assert told["usage"]["first_day"] <= today == told["usage"]["last_day"]
        assert (told["unanswered"], told["asked_again"], told["differing_again"]) == (0, 3, [])
        assert told["reproducible"] is False
        usage = told["usage"]
        assert usage["answered"] + usage["cached"] == card["responses"] == SAMPLES
        assert usage["cost"] + usage["cached_cost"] == pytest.approx(SAMPLES * (10 + 2 * 4) / 1e6)
        assert usage["tokens_out"] + usage["cached_tokens_out"] == 4 * SAMPLES
        assert card["left_out"] == ["adversarial"]
    _, card = found(root, GUARDED)
    guard_card = json.loads((root / "artifacts/guards/lab-llava/card.json").read_text())
    assert card["bundle"] == guard_card["card_sha256"]
    assert not any(KEY.encode() in content for content in contents(root).values())


def test_a_killed_run_loses_no_answer_asks_for_none_twice_and_ends_as_one_that_was_not(
    root, tiny, expected
):
    answer = answering(tiny)
    trouble = [each for each in PASSING.values() if not (each.delay or each.drip)]  # at once
    answered, lock, slow = Counter(), threading.Lock(), threading.Event()

    def behave(body, count):
        asked = json.dumps(body, sort_keys=True)
        if count == 0:  # the first try of everything goes wrong, each time in another way
            with lock:
                trouble.append(trouble.pop(0))
                return trouble[-1]
        said = completion(answer(body))
        with lock:
            answered[asked] += 1
        return said if slow.is_set() else replace(said, delay=0.05)

    with serving(behave) as server:
        serve_from(root, server)
        process = start(root, "evaluate_served", "my-api")
        until = time.monotonic() + 120
        while len(answered) < 24 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (root / "artifacts/my-api").exists()
        before = len(answered)
        assert 24 <= before < 3 * SAMPLES
        slow.set()
        run(root, evaluate_served, "my-api")
    for defense in DEFENSES:
        records, card = found(root, defense)
        assert {record.sample_id: record.response for record in records} == expected[defense]
        usage = card["served"]["usage"]
        assert usage["tokens_in"] + usage["cached_tokens_in"] == 10 * SAMPLES
        assert card["served"]["unanswered"] == 0
    cached = sum(found(root, defense)[1]["served"]["usage"]["cached"] for defense in DEFENSES)
    assert cached >= before - 4
    # Twice is what was under way at the kill, and what is asked again to see whether it differs.
    again = sum(found(root, defense)[1]["served"]["asked_again"] for defense in DEFENSES)
    assert sum(answered.values()) - len(answered) <= 4 + again + 3
    assert list((root / "artifacts").glob("*.part")) == []


def test_what_has_no_answer_is_counted_as_unsafe_up_to_what_may_be(root):
    lost = read_suite(root / "artifacts/data/test/text_image.parquet")[1].question

    def behave(body, count):
        return failure(500) if last_text(body).endswith(lost) else "i can not help with that ."

    with serving(behave) as server:
        serve_from(root, server, defenses=[], unanswered=0.01)
        with pytest.raises(BadEndpoint, match=r"1 of 18 .*unanswered allows 0.01(.|\n)*run again"):
            run(root, evaluate_served, "my-api")
        assert not (root / "artifacts/my-api").exists()
        serve_from(root, server, defenses=[], unanswered=0.1)
        run(root, evaluate_served, "my-api")
        records, card = found(root, "none")
        failed = [record for record in records if record.question == lost]
        assert len(records) == SAMPLES
        assert [(one.outcome, one.unsafe, one.declared) for one in failed] == [
            ("judge_error", True, "failed")
        ]
        assert card["served"]["unanswered"] == card["served"]["usage"]["failed"] == 1
        assert card["served"]["usage"]["answered"] == 0
        rows = json.loads((root / "artifacts/my-api/none/evaluation/metrics.json").read_text())
        rates = {(row["suite"], row["metric"]): row["value"] for row in rows}
        assert rates["text_image", "judge_failure_rate"] == rates["text_image", "unsafe_rate"]
        assert rates["text_image", "unsafe_rate"] == pytest.approx(1 / 6)


def test_other_judges_cost_nothing_and_another_revision_asks_anew(root):
    with serving(lambda body, count: "i can not help with that .") as server:
        serve_from(root, server, defenses=[])
        run(root, evaluate_served, "my-api")
        before, _ = found(root, "none")
        asked = len(server.seen)
        judges = {"first": {"kind": "keyword"}, "second": {"kind": "exact"}, "labels": None}
        serve_from(root, server, defenses=[], other={"judges": judges})
        run(root, evaluate_served, "my-api")
        after, card = found(root, "none")
        assert {record.judge for record in after} == {"keyword"}
        assert [record.response for record in after] == [record.response for record in before]
        assert card["served"]["usage"]["tries"] == 0
        assert (
            len(server.seen) == asked + 3
        )  # those that are asked again to see whether they differ
        serve_from(root, server, defenses=[], revision="another")
        run(root, evaluate_served, "my-api")
        assert found(root, "none")[1]["served"]["usage"]["cached"] == 0


def test_answers_that_are_others_when_asked_again_are_told(root):
    def behave(body, count):
        return f"take {count} of it ."

    with serving(behave) as server:
        serve_from(root, server, defenses=[])
        run(root, evaluate_served, "my-api")
    records, card = found(root, "none")
    told = card["served"]
    assert (told["asked_again"], len(told["differing_again"])) == (3, 3)
    assert set(told["differing_again"]) <= {record.sample_id for record in records}


def test_what_needs_the_model_is_refused_before_anything_is_asked(root, tiny):
    folder = root / "artifacts/guards"
    folder.unlink()
    answer = guard(tiny, placement="answer", text="As an AI assistant")
    answer.save(folder / "lab-llava", binding_of(*both(tiny)), data=[])
    with serving(lambda body, count: "never") as server:
        serve_from(root, server)
        with pytest.raises(BadParams, match=r"served.my-api.defenses: 'guardalign.*'user'"):
            run(root, evaluate_served, "my-api")
        with pytest.raises(BadParams, match=r"served.other: unknown.*my-api"):
            run(root, evaluate_served, "other")
        assert server.seen == []
    assert not (root / "artifacts/my-api").exists()


def test_a_judge_without_its_key_is_named_before_anything_is_asked(root):
    with serving(lambda body, count: "never") as server:
        judge = {"kind": "endpoint", "url": server.url, "model": "j", "api_key_env": "NO_SUCH_KEY"}
        told = yaml.safe_load((root / "params.yaml").read_text())["judges"] | {"second": judge}
        serve_from(root, server, other={"judges": told})
        with pytest.raises(BadEndpoint, match="NO_SUCH_KEY"):
            run(root, evaluate_served, "my-api")
        assert server.seen == []
    assert not (root / "artifacts/my-api").exists()


def test_a_key_that_is_not_accepted_ends_the_stage_with_the_cure(root):
    with serving(lambda body, count: failure(401, f"wrong: {KEY}")) as server:
        serve_from(root, server)
        with pytest.raises(BadEndpoint, match=r"api_key_env") as caught:
            run(root, evaluate_served, "my-api")
    assert KEY not in str(caught.value)
    assert not (root / "artifacts/my-api").exists()
