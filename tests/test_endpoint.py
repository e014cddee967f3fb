"""The client of served models: against a real server, in whatever state it is."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import hauberk.replies as replies_home
from hauberk.endpoint import Endpoint, EndpointSetting, data_url, user_content
from hauberk.errors import BadData, BadEndpoint
from hauberk.replies import retry_after
from tests.serving import Answer, completion, failure, last_text, serving

SECRET = "sk-this-is-a-secret"


def setting_of(server, **options):
    quick = {"backoff": 0.01, "timeout": 1.0, "deadline": 3.0, "retries": 3, "concurrency": 4}
    return EndpointSetting(server.url, "m", **(quick | options))


def payload(text):
    return {"messages": [{"role": "user", "content": text}]}


def ask(server, texts, **options):
    return Endpoint(setting_of(server, **options)).ask(map(payload, texts))


def echo(body, count):
    return f"said {last_text(body)}"


PAST = format_datetime(datetime(2000, 1, 1, tzinfo=UTC), usegmt=True)
GOOD = completion("good").raw
PASSING = {
    "429": failure(429),
    "429, wait none": failure(429, headers={"Retry-After": "0"}),
    "429, wait until a date": failure(429, headers={"Retry-After": PAST}),
    "429, wait until whenever": failure(429, headers={"Retry-After": "soon"}),
    "408": failure(408),
    "409": failure(409),
    "500": failure(500),
    "502 of a proxy": Answer(b"<html>bad gateway</html>", 502),
    "529": failure(529),
    "nothing": Answer(b""),
    "no JSON": Answer(b"<html>please log in</html>"),
    "no object": Answer(b"[1, 2]"),
    "deep JSON": Answer(b"[" * 100_000),
    "an error that says 200": Answer(b'{"error": {"message": "overloaded"}}'),
    "no choices": Answer(b'{"choices": []}'),
    "choices of nothing": Answer(b'{"choices": [null]}'),
    "a choice without message": Answer(b'{"choices": [{"text": "good"}]}'),
    "a message without content": Answer(b'{"choices": [{"message": {"role": "assistant"}}]}'),
    "content that is a number": Answer(b'{"choices": [{"message": {"content": 3}}]}'),
    "parts that are pictures": Answer(b'{"choices": [{"message": {"content": [{"url": ""}]}}]}'),
    "a body cut short": Answer(GOOD[:-10], cut=True),
    "a body cut short that nobody notices": Answer(GOOD[:-10]),
    "bytes that are no text": Answer(b"\xff\xfe\x00"),
    "what was said to be packed": Answer(GOOD, headers={"Content-Encoding": "gzip"}),
    "a stream": Answer(b"data: {}\n\ndata: [DONE]\n\n"),
    "a closed connection": Answer(silent=True),
    "silence": Answer(GOOD, delay=5.0),
    "a byte now and then": Answer(drip=True),
}


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_tried_again_and_every_answer_stands_in_its_place(trouble):
    def behave(body, count):
        troubled = last_text(body) in ("b", "d") and count < 1
        return trouble if troubled else echo(body, count)

    with serving(behave) as server:
        replies = ask(server, "abcde", timeout=0.3)
        assert [reply.text for reply in replies] == [f"said {text}" for text in "abcde"]
        assert not any(reply.error or reply.refused for reply in replies)
        assert len(server.seen) == 7


@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_what_does_not_pass_ends_as_an_error_in_bounded_time_and_is_not_kept(trouble, tmp_path):
    def behave(body, count):
        return trouble if last_text(body) == "b" else echo(body, count)

    with serving(behave) as server:
        options = {"timeout": 0.2, "retries": 2, "cache": tmp_path / "cache"}
        began = time.monotonic()
        replies = ask(server, "abc", **options)
        assert time.monotonic() - began < 3.0
        assert [reply.text for reply in replies] == ["said a", "", "said c"]
        assert [bool(reply.error) for reply in replies] == [False, True, False]
        assert server.url in replies[1].error
        assert "3 tries" in replies[1].error
        assert len(server.seen) == 5
        server.behave = echo
        again = ask(server, "abc", **options)
        assert [reply.text for reply in again] == ["said a", "said b", "said c"]
        assert [reply.cached for reply in again] == [True, False, True]
        assert len(server.seen) == 6


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_wrong_with_one_request_is_not_tried_again(status):
    def behave(body, count):
        return failure(status, "too long") if last_text(body) == "b" else echo(body, count)

    with serving(behave) as server:
        replies = ask(server, "abc")
        assert [reply.text for reply in replies] == ["said a", "", "said c"]
        assert f"{status}: too long" in replies[1].error
        assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("answer", "cure"),
    [
        (failure(401), "api_key_env"),
        (failure(402), "money"),
        (failure(403), "model"),
        (failure(404), "url"),
        (failure(429, code="insufficient_quota"), "money"),
        (failure(429, type="insufficient_quota"), "money"),
        (Answer(b"", 307, {"Location": "http://127.0.0.1:9/v1"}), "url"),
    ],
)
def test_what_concerns_all_requests_ends_the_run_with_its_cure_and_keeps_what_was_answered(
    answer, cure, tmp_path
):
    def behave(body, count):
        return answer if last_text(body) == "c" else echo(body, count)

    with serving(behave) as server:
        options = {"cache": tmp_path / "cache", "concurrency": 1}
        with pytest.raises(BadEndpoint, match=cure):
            ask(server, "abcde", **options)
        assert [last_text(body) for body in server.seen] == ["a", "b", "c"]
        server.behave = echo
        assert [reply.cached for reply in ask(server, "abcde", **options)] == [
            True, True, False, False, False,
        ]  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        completion(None, refusal="I can not judge that."),
        completion("", refusal="I can not judge that."),
        failure(400, "I can not judge that.", code="content_filter"),
        failure(403, "I can not judge that.", metadata={"flagged_input": "harmful request 3"}),
    ],
)
def test_a_declared_refusal_is_told_apart_from_an_answer_and_from_an_error(answer, tmp_path):
    with serving(lambda body, count: answer) as server:
        for cached in (False, True):
            (reply,) = ask(server, "a", cache=tmp_path / "cache")
            assert (reply.refused, reply.error, reply.text) == (True, "", "I can not judge that.")
            assert reply.cached is cached
        assert len(server.seen) == 1


def test_an_answer_cut_by_a_filter_is_a_refusal_and_one_cut_by_its_length_is_none():
    def behave(body, count):
        raw = json.loads(completion("half").raw)
        raw["choices"][0]["finish_reason"] = last_text(body)
        return Answer(json.dumps(raw).encode())

    with serving(behave) as server:
        cut, ended = ask(server, ["content_filter", "length"])
        assert (cut.refused, ended.refused, ended.text) == (True, False, "half")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("", ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        (["a", "b"], "ab"),
        ("\ud83d\ude00 and \ud800", "\U0001f600 and \ufffd"),
    ],
)
def test_content_is_read_in_every_form_that_is_text(content, text):
    with serving(lambda body, count: completion(content)) as server:
        (reply,) = ask(server, "a")
        assert (reply.text, reply.error) == (text, "")


def test_any_text_reaches_the_server_as_it_is():
    texts = ["\ud800", "\0", '"}', "\u2028", "ü" * 1000]
    with serving(lambda body, count: "yes") as server:
        ask(server, texts, concurrency=1)
        assert [last_text(body) for body in server.seen] == texts


def test_the_server_is_waited_for_as_long_as_it_says():
    def behave(body, count):
        return echo(body, count) if count else failure(429, headers={"Retry-After": "1"})

    with serving(behave) as server:
        (reply,) = ask(server, "a")
        assert reply.text == "said a"
        assert server.times[1] - server.times[0] >= 1.0


@pytest.mark.parametrize("value", ["3600", "999999999", "Wed, 01 Jan 2200 00:00:00 GMT"])
def test_a_wait_that_would_outlast_the_deadline_is_not_begun(value):
    with serving(lambda body, count: failure(429, headers={"Retry-After": value})) as server:
        began = time.monotonic()
        (reply,) = ask(server, "a")
        assert time.monotonic() - began < 1.0
        assert "429" in reply.error
        assert "after its 3 s" in reply.error
        assert len(server.seen) == 1


@given(st.text(max_size=30))
def test_any_text_as_retry_after_is_a_time_that_is_not_negative_or_ignored(text):
    found = retry_after(text)
    assert found is None or found >= 0


def test_retry_after_is_read_as_seconds_or_as_a_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after("7") == 7.0
    assert retry_after("0.5") == 0.5
    assert 28 < retry_after(soon) <= 30
    assert retry_after(PAST) == 0.0
    assert [retry_after(text) for text in ("", "nan", "inf", "-3", "1e9", "tomorrow")] == [None] * 6
    beyond = ("Mon, 99999999999999999999999 Jan 2030 00:00:00 GMT", "Mon, 01 Jan 9{0} 00:00 GMT")
    assert [retry_after(text.format("9" * 30)) for text in beyond] == [None] * 2


def test_a_server_that_is_down_is_given_up_and_no_request_is_lost():
    with serving(echo) as server:
        pass
    began = time.monotonic()
    replies = ask(server, map(str, range(100)), retries=1, patience=5, concurrency=2)
    assert time.monotonic() - began < 3.0
    assert len(replies) == 100
    assert all(reply.error for reply in replies)
    assert "5 requests in a row" in replies[-1].error


def test_requests_are_under_way_together_and_never_more_than_allowed():
    def behave(body, count):
        return Answer(completion(echo(body, count)).raw, delay=0.05)

    with serving(behave) as server:
        texts = [str(number) for number in range(64)]
        replies = ask(server, texts, concurrency=16)
        assert [reply.text for reply in replies] == [f"said {text}" for text in texts]
        assert 8 <= server.most <= 16


def test_one_slow_answer_holds_up_no_other():
    def behave(body, count):
        return Answer(GOOD, delay=0.5) if last_text(body) == "0" else echo(body, count)

    with serving(behave) as server:
        came = []
        endpoint = Endpoint(setting_of(server, concurrency=2))
        endpoint.ask(map(payload, map(str, range(20))), lambda index, reply: came.append(index))
        assert came == [*range(1, 20), 0]


def test_requests_leave_no_faster_than_allowed_also_those_that_are_tried_again():
    def behave(body, count):
        return echo(body, count) if count else failure(500)

    with serving(behave) as server:
        ask(server, "abc", requests_per_minute=1200)  # one in 50 ms
        assert len(server.seen) == 6
        assert all(later - earlier > 0.03 for earlier, later in pairwise(server.times))
        assert server.times[-1] - server.times[0] > 0.2


def test_an_answer_without_end_is_not_read_to_it(monkeypatch):
    monkeypatch.setattr(replies_home, "_LARGEST", 10_000)
    with serving(lambda body, count: Answer(b" " * 100_000)) as server:
        (reply,) = ask(server, "a", retries=0)
        assert "10000 bytes" in reply.error


def test_what_is_in_the_cache_is_not_asked_again_and_costs_nothing_more(tmp_path):
    with serving(echo) as server:
        options = {"cache": tmp_path / "new" / "cache", "price_in": 2.0, "price_out": 5.0}
        first = Endpoint(setting_of(server, **options))
        told = first.ask(map(payload, "abc"))
        assert [reply.cost for reply in told] == pytest.approx([(20 + 20) / 1e6] * 3)
        assert first.usage.cost == pytest.approx(120 / 1e6)
        assert (first.usage.tokens_in, first.usage.tokens_out) == (30, 12)
        second = Endpoint(setting_of(server, **options))
        again = second.ask(map(payload, "abcd"))
        assert [(reply.text, reply.cost) for reply in again[:3]] == [
            (reply.text, reply.cost) for reply in told
        ]
        assert (second.usage.cached, second.usage.answered) == (3, 1)
        assert second.usage.cost == pytest.approx(40 / 1e6)
        assert second.usage.cached_cost == pytest.approx(120 / 1e6)
        assert (second.usage.cached_tokens_in, second.usage.cached_tokens_out) == (30, 12)
        assert len(server.seen) == 4


def test_the_days_on_which_answers_came_are_told_also_of_what_was_kept(tmp_path):
    cache = tmp_path / "cache"
    with serving(echo) as server:
        Endpoint(setting_of(server, cache=cache)).ask(map(payload, "ab"))
        with sqlite3.connect(cache) as file:
            rows = file.execute("SELECT asked, reply FROM replies").fetchall()
            for (asked, reply), day in zip(rows, ("2026-01-02", None), strict=True):
                told = json.loads(reply) | {"day": day}
                if day is None:  # of a version that did not keep it
                    del told["day"]
                file.execute(
                    "UPDATE replies SET reply = ? WHERE asked = ?", (json.dumps(told), asked)
                )
        endpoint = Endpoint(setting_of(server, cache=cache))
        replies = endpoint.ask(map(payload, "abc"))
    today = datetime.now(UTC).date().isoformat()
    assert sorted(reply.day for reply in replies) == ["", "2026-01-02", today]
    assert (endpoint.usage.first_day, endpoint.usage.last_day) == ("2026-01-02", today)


@pytest.mark.parametrize("changed", [{"model": "n"}, {"options": {"seed": 1}}])
def test_another_model_or_option_is_another_question(changed, tmp_path):
    with serving(echo) as server:
        same = {"model": "m", "cache": tmp_path / "cache"}
        for options in (same, same | changed):
            (reply,) = Endpoint(EndpointSetting(server.url, **options)).ask([payload("a")])
            assert not reply.cached
        assert len(server.seen) == 2


def test_another_server_is_another_question(tmp_path):
    for _ in range(2):
        with serving(echo) as server:
            (reply,) = ask(server, "a", cache=tmp_path / "cache")
            assert not reply.cached


def test_equal_requests_are_asked_once():
    def behave(body, count):
        return Answer(completion(f"{count}").raw, delay=0.05)

    with serving(behave) as server:
        replies = ask(server, "aaaa", price_in=1.0)
        assert [reply.text for reply in replies] == ["0"] * 4
        assert [reply.cached for reply in replies].count(False) == 1
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    "usage", [None, 3, {}, {"prompt_tokens": "ten", "completion_tokens": -1}, {"prompt_tokens": 3}]
)
def test_tokens_that_a_server_does_not_count_are_said_to_be_missing(usage):
    def behave(body, count):
        return Answer(json.dumps(json.loads(GOOD) | {"usage": usage}).encode())

    with serving(behave) as server:
        endpoint = Endpoint(setting_of(server, price_in=1.0))
        endpoint.ask([payload("a")])
        assert endpoint.usage.uncounted == 1


KILLED = """
import sys
from pathlib import Path
from hauberk.endpoint import Endpoint, EndpointSetting
url, cache, count = sys.argv[1:]
setting = EndpointSetting(url, "m", cache=Path(cache), concurrency=3)
texts = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(int(count))]
replies = Endpoint(setting).ask(texts, lambda index, reply: print(index, flush=True))
print([reply.text for reply in replies])
"""


def start(server, cache, count):
    command = [sys.executable, "-c", KILLED, server.url, str(cache), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_run_that_was_killed_asks_only_for_what_it_lacks(tmp_path):
    def behave(body, count):
        return Answer(completion(echo(body, count)).raw, delay=0.02)

    with serving(behave) as server, start(server, tmp_path / "cache", 200) as run:
        kept = {int(run.stdout.readline()) for _ in range(20)}
        os.kill(run.pid, signal.SIGKILL)
        kept |= {int(line) for line in run.stdout.read().splitlines()[:-1]}
        run.wait()
        asked = len(server.seen)
        assert asked < 200
        replies = ask(server, map(str, range(200)), cache=tmp_path / "cache")
        assert [reply.text for reply in replies] == [f"said {number}" for number in range(200)]
        assert all(replies[index].cached for index in kept)
        assert len(server.seen) - asked == sum(not reply.cached for reply in replies)


def test_two_runs_at_once_share_a_cache(tmp_path):
    with serving(echo) as server:
        with (
            start(server, tmp_path / "cache", 50) as one,
            start(server, tmp_path / "cache", 50) as two,
        ):
            ends = [run.communicate(timeout=60)[0].splitlines()[-1] for run in (one, two)]
            assert ends == [str([f"said {number}" for number in range(50)])] * 2
        assert 50 <= len(server.seen) <= 100


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"x" * 200])
def test_a_file_that_is_no_cache_is_named_and_left_alone(tmp_path, content):
    path = tmp_path / "cache"
    path.write_bytes(content)
    with serving(echo) as server, pytest.raises(BadData, match=r"cache.*delete it"):
        ask(server, "a", cache=path)
    assert path.read_bytes() == content
    assert server.seen == []


def test_the_key_reaches_the_server_and_nothing_else(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("A_KEY", SECRET)
    caplog.set_level("DEBUG")

    def behave(body, count):
        if last_text(body) == "a":
            return f"you are {SECRET}"
        return failure(int(last_text(body)), f"wrong key {SECRET}")

    with serving(behave) as server:
        options = {"api_key_env": "A_KEY", "cache": tmp_path / "cache", "retries": 1}
        replies = ask(server, ["a", "400", "500"], **options)
        with pytest.raises(BadEndpoint) as told:
            ask(server, ["401"], **options)
        assert {head["Authorization"] for head in server.headers} == {f"Bearer {SECRET}"}
        assert SECRET not in json.dumps(server.seen)
    shown = repr([replies, told.value, setting_of(server, **options)])
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert "wrong key" in shown
    assert SECRET not in shown + caplog.text + "".join(capfd.readouterr())
    assert SECRET.encode() not in written


SLASHED = 'sk-this/is+a"secret\\-A1'


def escaped(text):
    return "".join(f"\\u{ord(each):04X}" for each in text)


SPELT = {
    "as it is": lambda said: json.dumps(said),
    "with slashes escaped": lambda said: json.dumps(said).replace("/", r"\/"),
    "with a plus escaped": lambda said: json.dumps(said).replace("+", r"\u002b"),
    "escaped throughout": lambda said: f'"{escaped(said)}"',
    "in a JSON of a JSON": lambda said: json.dumps(json.dumps(said).replace("/", r"\/")),
}
"""How a server may spell the same text in JSON."""


@pytest.mark.parametrize("spelt", SPELT)
@pytest.mark.parametrize("status", [200, 400, 401, 500])
@pytest.mark.parametrize("coding", ["utf-8", "utf-16"])
def test_a_key_that_is_spelt_in_another_way_is_taken_out_as_well(
    tmp_path, monkeypatch, caplog, spelt, status, coding
):
    monkeypatch.setenv("A_KEY", SLASHED)
    caplog.set_level("DEBUG")
    said = SPELT[spelt](f"wrong key {SLASHED}")
    bodies = {
        200: f'{{"choices": [{{"message": {{"content": {said}}}}}]}}',
        400: f'{{"error": {{"message": {said}}}}}',
        401: f'{{"detail": {said}}}',
    }
    answer = Answer(bodies.get(status, said).encode(coding), status)
    options = {"api_key_env": "A_KEY", "cache": tmp_path / "cache", "retries": 0}
    with serving(lambda body, count: answer) as server:
        try:
            (reply,) = ask(server, "a", **options)
            shown = reply.text + reply.error
        except BadEndpoint as error:
            shown = str(error)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir()).decode("latin-1")
    for text in (shown, written, caplog.text):
        plain = text.replace("\\", "").replace("\0", "").replace("x00", "")
        assert not re.search(r"sk-this.?is|secret", plain)
        assert not re.search("u0073.*u006B", text)


def test_a_key_in_two_parts_of_an_answer_is_taken_out(monkeypatch):
    monkeypatch.setenv("A_KEY", SECRET)
    parts = [{"type": "text", "text": SECRET[:9]}, {"type": "text", "text": SECRET[9:]}]
    body = json.dumps({"choices": [{"message": {"content": parts}}]}).encode()
    with serving(lambda *_: Answer(body)) as server:
        (reply,) = ask(server, "a", api_key_env="A_KEY")
    assert reply.text == "[key]"


@pytest.mark.parametrize("value", [None, "", " ", "two words", "zwölf", "a\nb"])
def test_a_key_that_is_none_is_said_before_anything_is_asked(monkeypatch, value):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(BadEndpoint, match="A_KEY") as told:
        Endpoint(EndpointSetting("http://localhost:1/v1", "m", api_key_env="A_KEY"))
    assert not (value and value.strip()) or value not in str(told.value)


def test_no_key_is_sent_where_none_is_named():
    with serving(echo) as server:
        ask(server, "a")
        assert "Authorization" not in server.headers[0]
        assert server.path == "/v1/chat/completions"


def test_it_works_where_an_event_loop_is_running():
    async def within(server):
        return ask(server, "ab")

    with serving(echo) as server:
        assert [reply.text for reply in asyncio.run(within(server))] == ["said a", "said b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_a_caller_raises_ends_the_run_as_it_is_and_keeps_what_was_answered(error, tmp_path):
    def stop(index, reply):
        if index == 2:
            raise error

    with serving(echo) as server:
        options = {"concurrency": 1, "cache": tmp_path / "cache"}
        with pytest.raises(error):
            Endpoint(setting_of(server, **options)).ask(map(payload, "abcdefgh"), stop)
        assert [reply.cached for reply in ask(server, "abc", **options)] == [True] * 3


def test_payloads_are_made_as_they_are_needed():
    made, came = [], []

    def texts():
        for number in range(100):
            made.append(number)
            yield payload(str(number))

    def watch(index, reply):
        assert len(made) - len(came) <= 4  # as many as are asked at a time
        came.append(index)

    with serving(echo) as server:
        assert len(Endpoint(setting_of(server)).ask(texts(), watch)) == 100


def test_options_are_sent_and_one_that_is_none_is_left_out():
    with serving(echo) as server:
        options = {"max_tokens": None, "max_completion_tokens": 7}
        endpoint = Endpoint(setting_of(server, options=options))
        endpoint.ask([payload("a") | {"max_tokens": 7}])
        assert server.seen == [
            payload("a") | {"model": "m", "stream": False, "max_completion_tokens": 7}
        ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("url", ""), ("url", "localhost:8000"), ("url", "ftp://h/v1"), ("url", 3),
        ("url", "http://user:hidden@h/v1"), ("url", "http://h/v1?key=hidden"),
        ("url", "http://hidden@h/v1/chat/completions"), ("url", "http://h/v1#hidden"),
        ("url", "http://h/v1/chat/completions"), ("model", ""), ("model", None),
        ("api_key_env", "sk-hidden"), ("concurrency", 0), ("concurrency", "8"),
        ("concurrency", True), ("retries", -1), ("patience", 0), ("timeout", 0),
        ("timeout", float("nan")), ("deadline", float("inf")), ("backoff", -1),
        ("requests_per_minute", 0), ("price_in", -1), ("price_out", "1"), ("options", 3),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}:") as told:
        EndpointSetting(**({"url": "http://h/v1", "model": "m"} | {name: value}))
    assert "hidden" not in str(told.value)


def test_pictures_are_sent_as_png_before_the_text():
    picture = Image.new("RGB", (3, 2), (255, 0, 0))
    seen, said = user_content("what is it?", [picture])
    assert said == {"type": "text", "text": "what is it?"}
    assert seen["image_url"]["url"] == data_url(picture)
    assert data_url(picture).startswith("data:image/png;base64,iVBOR")
    assert user_content("what is it?") == "what is it?"
