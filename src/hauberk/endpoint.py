"""Asking a model that others serve: any OpenAI-compatible endpoint, whatever state it is in.

Requests go out together, at most ``concurrency`` at a time and ``requests_per_minute`` in a minute.
What may pass is tried again: 408, 409, 429, 5xx, a lost connection, silence, a body that is no
answer.  Before the next try a request waits as long as the server asks for (``Retry-After``), or
for a random part of a time that doubles with every try.  Every request has a deadline, so that a
run ends whatever the server does; what has no answer then is a :class:`Reply` with an error.  What
concerns all requests alike, such as a key that is not accepted, ends the run at once.

Answers are kept in a file as they come.  A run that was ended, by an error or a kill, asks only for
what the file lacks when it is started again; several runs may share the file.

Source of the waiting: Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog 2015 (its
"full jitter").  Source of the format: OpenAI's API reference, "Create chat completion", as vLLM,
SGLang, llama.cpp and ``transformers serve`` follow it.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import httpx
from PIL import Image

from hauberk.errors import BadEndpoint
from hauberk.replies import (
    ErrorBody,
    NoAnswer,
    Reply,
    ReplyCache,
    read_body,
    read_completion,
    retry_after,
    spellings,
)

T = TypeVar("T")

_VARIABLE = re.compile(r"([A-Z_][A-Z0-9_]*)?")
"""As no key is spelt."""
_AGAIN = {408, 409, 429}
"""Statuses, beside 5xx, that may pass: what OpenAI's own client tries again."""
_CURES = {
    401: "its key is not accepted: correct the environment variable that `api_key_env` names",
    402: "the account has no money left",
    403: "its key may not use this model: correct `model`, or take another key",
    404: "there is no such address or model: correct `url` (it ends before /chat/completions) and "
    "`model`",
}
"""What concerns all requests alike, and what to do about it."""
_LONGEST_WAIT = 60.0
"""Seconds between two tries at most, whatever the server asks for: a minute is the window that
limits of requests are counted in."""
_SECRET = 8
"""Characters of a key from which on it is one; local servers take words such as "EMPTY"."""


@dataclass(frozen=True)
class EndpointSetting:
    """Where a model is served, and how it may be asked.

    Raises
    ------
    ValueError
        If a value is of the wrong type or out of range, or the address holds a password or a query.
    """

    url: str
    """The address before ``/chat/completions``, such as ``http://localhost:8000/v1``."""
    model: str
    api_key_env: str = ""
    """The environment variable that holds the key; "" for a server that asks for none."""
    concurrency: int = 8
    requests_per_minute: float | None = None
    """Tries count; they leave evenly spaced.  None for no limit."""
    timeout: float = 120.0
    """Seconds that one try may take, from the connection to the last byte."""
    deadline: float = 600.0
    """Seconds that one request may take, with all its tries and the waits between them; not the
    wait for its turn."""
    retries: int = 6
    backoff: float = 1.0
    """Seconds that the first wait is below; every further one below twice as many."""
    patience: int = 32
    """Requests in a row that end without an answer, however often they are tried, before the rest
    is given up: the server is down."""
    price_in: float = 0.0
    """Of a million tokens of prompt, in the provider's currency."""
    price_out: float = 0.0
    cache: Path | None = None
    """The file that answers are kept in; None to keep none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request, before those that hauberk sets: ``{"seed": 1}``.  One that
    is None is left out: ``{"max_tokens": None, "max_completion_tokens": 500}``."""

    def __post_init__(self) -> None:
        _check_address(self.url)
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(
                f"model: {self.model!r} is wrong, the name of a served model is right."
            )
        if not isinstance(self.api_key_env, str) or not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError(
                "api_key_env: is no name of an environment variable; the key itself stands nowhere "
                "but in the variable."
            )
        for name, least in {"concurrency": 1, "retries": 0, "patience": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: {value!r} is wrong, a number from {least} on is right.")
        for name in ("timeout", "deadline", "backoff", "requests_per_minute"):
            value = getattr(self, name)
            unlimited = name == "requests_per_minute" and value is None
            if not (unlimited or (_number(value) and value > 0)):
                raise ValueError(f"{name}: {value!r} is wrong, a number above 0 is right.")
        for name in ("price_in", "price_out"):
            value = getattr(self, name)
            if not (_number(value) and value >= 0):
                raise ValueError(f"{name}: {value!r} is wrong, 0 or more is right.")
        if not isinstance(self.options, Mapping):
            raise ValueError("options: fields with values are right, and nothing else.")
        if self.cache is not None:
            object.__setattr__(self, "cache", Path(self.cache))


def _check_address(url: Any) -> None:
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        address = httpx.URL("")
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError("url: is no address of a server; http://localhost:8000/v1 would be one.")
    if address.userinfo or address.query or address.fragment:
        raise ValueError(
            "url: holds a password, a query or a fragment, which would stand in messages; give "
            "the bare address, and a key by `api_key_env`."
        )
    if address.path.rstrip("/").endswith("/chat/completions"):
        raise ValueError(f"url: {url} is too long; leave out /chat/completions.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


@dataclass
class Usage:
    """What the requests of an :class:`Endpoint` came to."""

    answered: int = 0
    cached: int = 0
    """Of which nothing was asked, as the answer was there."""
    failed: int = 0
    tries: int = 0
    """Requests that left, those that were tried again included."""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    uncounted: int = 0
    """Answers whose tokens the server did not count: the cost is then too low."""
    cached_tokens_in: int = 0
    cached_tokens_out: int = 0
    cached_cost: float = 0.0
    """What the cached ones came to when they were asked, at the prices of now."""
    first_day: str = ""
    last_day: str = ""
    """On which answers came, cached ones included, as 2026-11-28 in UTC."""

    def add(self, reply: Reply) -> None:
        """Count one."""
        if reply.error:
            self.failed += 1
            return
        self.first_day = min(filter(None, (self.first_day, reply.day)), default="")
        self.last_day = max(self.last_day, reply.day)
        if reply.cached:
            self.cached += 1
            self.cached_tokens_in += reply.tokens_in or 0
            self.cached_tokens_out += reply.tokens_out or 0
            self.cached_cost += reply.cost
        else:
            self.answered += 1
            self.tokens_in += reply.tokens_in or 0
            self.tokens_out += reply.tokens_out or 0
            self.cost += reply.cost
            self.uncounted += None in (reply.tokens_in, reply.tokens_out)


class Endpoint:
    """A served model that can be asked many things at once.

    Parameters
    ----------
    setting : where and how

    Raises
    ------
    BadEndpoint
        If the environment variable that should hold the key is not set, or holds no key.
    """

    def __init__(self, setting: EndpointSetting) -> None:
        self.setting, self.usage = setting, Usage()
        self._key = key_of(setting.api_key_env)
        self._secret = re.compile(spellings(self._key)) if len(self._key) >= _SECRET else None
        self._jitter = Random()
        self._next_turn = 0.0
        self._failed_in_row = 0

    def ask(
        self,
        payloads: Iterable[Mapping[str, Any]],
        on_reply: Callable[[int, Reply], Any] = lambda index, reply: None,
    ) -> list[Reply]:
        """Ask everything, from a program with a running event loop or without one.

        Parameters
        ----------
        payloads : bodies of requests, without the model; read one by one, as there is room for
            another request, so that they may be made meanwhile.  Equal ones are asked once
        on_reply : called with the number of a request and its reply, as they come

        Returns
        -------
        list of Reply
            In the order of ``payloads``, one for each.

        Raises
        ------
        BadEndpoint
            If the server refuses all requests alike, naming the cure.  What was answered before is
            in the cache.
        BadData
            If the cache is no cache, or cannot be written.
        """
        return _finished(self._ask(payloads, on_reply))

    async def _ask(
        self, payloads: Iterable[Mapping[str, Any]], on_reply: Callable[[int, Reply], Any]
    ) -> list[Reply]:
        self._failed_in_row = 0  # the server may be up again
        replies: dict[int, Reply] = {}
        waiting, one_reader = enumerate(payloads), asyncio.Lock()
        asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

        async def work(client: httpx.AsyncClient, cache: ReplyCache) -> None:
            while True:
                async with one_reader:  # making a payload may take long: replies go on meanwhile
                    numbered = await asyncio.to_thread(next, waiting, None)
                if numbered is None:
                    return
                index, payload = numbered
                body = self._body(payload)
                key = hashlib.sha256(self.setting.url.encode() + b"\n" + body).hexdigest()
                async with asking[key]:
                    reply = cache.get(key) or await self._answer(client, body)
                    if not (reply.cached or reply.error):
                        cache.put(key, reply)
                reply = replace(reply, cost=self._cost(reply))
                self.usage.add(reply)
                replies[index] = reply
                try:
                    on_reply(index, reply)
                except (KeyboardInterrupt, SystemExit) as error:
                    raise _Stopped(error) from None

        size = self.setting.concurrency
        limits = httpx.Limits(max_connections=size, max_keepalive_connections=size)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        with closing(ReplyCache(self.setting.cache)) as cache:
            async with httpx.AsyncClient(timeout=None, limits=limits, headers=headers) as client:
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(size):
                            group.create_task(work(client, cache))
                except BaseExceptionGroup as errors:
                    first = errors.exceptions[0]
                    raise (first.error if isinstance(first, _Stopped) else first) from None
        return [replies[index] for index in range(len(replies))]

    def _body(self, payload: Mapping[str, Any]) -> bytes:
        """Write a request; equal ones become equal bytes, and any text becomes ASCII."""
        whole = {"model": self.setting.model, **payload, "stream": False, **self.setting.options}
        there = {name: value for name, value in whole.items() if value is not None}
        return json.dumps(there, sort_keys=True).encode()

    def _cost(self, reply: Reply) -> float:
        setting = self.setting
        paid = setting.price_in * (reply.tokens_in or 0)
        return (paid + setting.price_out * (reply.tokens_out or 0)) / 1e6

    async def _answer(self, client: httpx.AsyncClient, body: bytes) -> Reply:
        """Try until there is an answer, or no more try is left."""
        setting = self.setting
        if self._failed_in_row >= setting.patience:
            return Reply(
                error=f"{setting.url} left {setting.patience} requests in a row without an answer, "
                "so this one was not sent; run again when the server is up."
            )
        left, why = setting.deadline, ""
        for tried in range(setting.retries + 1):
            await self._turn()
            self.usage.tries += 1
            began = time.monotonic()
            try:
                reply = await self._attempt(client, body, min(setting.timeout, left))
            except NoAnswer as none:
                why, asked = str(none), none.wait
            else:
                self._failed_in_row = 0
                today = datetime.now(UTC).date().isoformat()
                return replace(reply, seconds=time.monotonic() - began, day=today)
            if tried == setting.retries:
                break
            wait = self._wait(tried, asked)
            left -= time.monotonic() - began + wait
            if left <= 0:
                why += f"; another try would end after its {setting.deadline:g} s"
                break
            await asyncio.sleep(wait)
        self._failed_in_row += 1
        tries = f"{tried + 1} of {setting.retries + 1} tries"
        return Reply(error=f"no answer of {setting.url} in {tries}: {why}")

    def _wait(self, tried: int, asked: float | None) -> float:
        if asked is None:
            return self._jitter.uniform(0, min(self.setting.backoff * 2**tried, _LONGEST_WAIT))
        return min(asked, _LONGEST_WAIT) + self._jitter.uniform(0, self.setting.backoff)

    async def _turn(self) -> None:
        """Wait for the next place in the minute: a bucket that holds one token."""
        if self.setting.requests_per_minute is None:
            return
        now = time.monotonic()
        turn = max(self._next_turn, now)
        self._next_turn = turn + 60 / self.setting.requests_per_minute
        await asyncio.sleep(turn - now)

    async def _attempt(self, client: httpx.AsyncClient, body: bytes, seconds: float) -> Reply:
        """Ask once; raise :class:`NoAnswer` for what may pass."""
        url = f"{self.setting.url.rstrip('/')}/chat/completions"
        try:
            async with asyncio.timeout(seconds):  # httpx's own would begin anew with every byte
                async with client.stream("POST", url, content=body) as response:
                    raw = await read_body(response)
        except TimeoutError:
            raise NoAnswer(f"silent for {seconds:.3g} s") from None
        except httpx.RequestError as error:
            raise NoAnswer(f"{type(error).__name__}: {self._without_key(str(error))}") from None
        # Before anything is cut off, which might leave the beginning of a key.
        raw = self._without_key(raw.decode("latin-1")).encode("latin-1")
        reply = read_completion(raw) if response.is_success else self._refusal(response, raw)
        return replace(reply, text=self._without_key(reply.text))  # parts may join to a key

    def _refusal(self, response: httpx.Response, raw: bytes) -> Reply:
        """Tell apart what may pass, what concerns this request, and what concerns all."""
        status, said = response.status_code, ErrorBody.of(raw)
        if said.filtered:
            return Reply(text=said.message, refused=True)
        told = f"{status}: {said.message}"
        spent = said.code == "insufficient_quota"  # OpenAI's 429 that does not pass
        if (status in _AGAIN or status >= 500) and not spent:
            raise NoAnswer(told, wait=retry_after(response.headers.get("retry-after", "")))
        if response.is_redirect:
            raise BadEndpoint(
                f"{self.setting.url} sends its requests elsewhere ({status}); give as `url` the "
                "address that it names in the end."
            )
        if spent or status in _CURES:
            cure = _CURES[402 if spent else status]
            raise BadEndpoint(f"{self.setting.url} answered {told}; {cure}.")
        return Reply(error=f"{self.setting.url} answered {told}")

    def _without_key(self, said: str) -> str:
        """Take out a key that a server repeats: what it says stands in messages and files."""
        return self._secret.sub("[key]", said) if self._secret else said


class _Stopped(Exception):
    """Carries out of a task what a loop would let fall out of its middle."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def _finished(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end: in a loop of its own, in a thread of its own if one is running here."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def key_of(variable: str) -> str:
    """Read a key from the environment; "" for the variable "".

    Raises
    ------
    BadEndpoint
        If the variable is not set, or holds what no key can be.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not re.fullmatch(r"[\x21-\x7e]+", key):  # what a header may hold
        what = "holds what is no key" if key else "is not set"
        raise BadEndpoint(
            f"the environment variable {variable}, which `api_key_env` names, {what}; "
            f"set it to the key: export {variable}=..."
        )
    return key


def data_url(image: Image.Image) -> str:
    """Write a picture as PNG into an address, as messages hold it.

    Raises
    ------
    BadRequest
        If :func:`hauberk.requests.as_rgb` cannot read it.
    """
    from hauberk.requests import as_rgb  # here, so that asking in words alone needs no torch

    file = io.BytesIO()
    as_rgb(image).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def user_content(text: str, images: Iterable[Image.Image] = ()) -> str | list[dict[str, Any]]:
    """Write what a user says, pictures first; text alone is plain, as every server reads it."""
    seen = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [*seen, {"type": "text", "text": text}] if seen else text
