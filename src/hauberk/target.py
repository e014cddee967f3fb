"""A model under test that others serve: it answers as :func:`hauberk.respond` does.

A served model cannot be opened, so only a defense that works on the request can guard it: a frame,
a mask, words in the prompt.  :func:`check_defense` refuses the others, before anything is asked.

What the endpoint leaves without an answer is a response with an ``error``, so that no sample is
lost; where a filter of the provider or the model itself declares a refusal, the response is
``refused``, and its text is what was said of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch

from hauberk.defenses import GuardAlign, Projector, SafetyPrompt, Shift, Stack, Undefended
from hauberk.endpoint import Endpoint, user_content
from hauberk.errors import BadRequest, UnsupportedRequest
from hauberk.replies import Reply
from hauberk.requests import Request, Response, SupportsDefense, rewritten
from hauberk.unserved import CHANGES


class Target:
    """A served vision-language model under test.

    Parameters
    ----------
    endpoint : asks it; with a cache, what was answered once is not asked again
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def respond(
        self,
        requests: Sequence[Request],
        defense: SupportsDefense | None = None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        on_batch: Callable[[Sequence[int], Sequence[Response]], None] | None = None,
    ) -> list[Response]:
        """Answer requests at temperature 0, rewritten by ``defense``, many at a time.

        Parameters
        ----------
        requests : any number of them
        defense : what rewrites the requests, as :func:`hauberk.read` gives it; None for nothing
        max_new_tokens : an answer ends here if the model does not end it
        batch_size : requests that are rewritten together; how many are asked at a time is said by
            the endpoint's setting
        on_batch : called for every response as it comes, with its index alone

        Returns
        -------
        list of Response
            In the order of ``requests``, with ``error`` for what has no answer.

        Raises
        ------
        UnsupportedRequest
            If the defense needs the model, or begins the answer for it.
        ValueError
            If a size is not positive.
        BadRequest
            Naming the request, if a picture cannot be read.
        BadEndpoint, BadData
            As :meth:`hauberk.endpoint.Endpoint.ask` does.
        """
        for name, number in {"batch_size": batch_size, "max_new_tokens": max_new_tokens}.items():
            if number < 1:
                raise ValueError(f"{name}: {number} is wrong, 1 or more is right.")
        check_defense(defense)
        keep = on_batch or (lambda indices, responses: None)
        replies = self.endpoint.ask(
            _payloads(requests, defense, batch_size, max_new_tokens),
            lambda index, reply: keep([index], [_response(reply)]),
        )
        return [_response(reply) for reply in replies]


@torch.no_grad()  # here and not around it: the endpoint makes its requests in another thread
def _payloads(
    requests: Sequence[Request],
    defense: SupportsDefense | None,
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(requests), batch_size):
        indices = range(start, min(start + batch_size, len(requests)))
        batch: Sequence[Request] = [requests[index] for index in indices]
        if defense:
            batch = rewritten(defense, batch, indices)
        for index, request in zip(indices, batch, strict=True):
            yield {
                "messages": _messages(request, index),
                "temperature": 0,
                "max_tokens": max_new_tokens,
            }


def _messages(request: Request, index: int) -> list[dict[str, Any]]:
    if request.begun:
        raise UnsupportedRequest(
            f"request {index}: the answer is to begin with {request.begun[:60]!r}, and a served "
            "model begins its answers itself; put these words before the question (placement "
            "'user')."
        )
    try:
        content = user_content(request.text, request.images)
    except BadRequest as error:
        raise BadRequest(f"request {index}: {error}") from error
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if request.system is not None:
        turns.insert(0, {"role": "system", "content": request.system})
    return turns


def _response(reply: Reply) -> Response:
    return Response(
        reply.text.strip(), reply.tokens_out or 0, reply.seconds, reply.error, reply.refused
    )


def check_defense(defense: SupportsDefense | None) -> None:
    """Refuse a defense that changes the model.

    Raises
    ------
    UnsupportedRequest
        Saying what it changes, and what of it would do without.
    """
    if defense is not None and (why := obstacle(defense)):
        raise UnsupportedRequest(f"a served model cannot be guarded by this defense: {why}")


@singledispatch
def obstacle(defense: SupportsDefense) -> str:
    """What keeps a defense from guarding a served model; "" for nothing.

    A defense of another package says so by ``obstacle.register``.
    """
    return (
        f"nobody said that {type(defense).__name__} leaves the model alone; if it does, register "
        "it: hauberk.target.obstacle.register."
    )


@obstacle.register(Undefended)
@obstacle.register(SafetyPrompt)
def _(defense: Undefended | SafetyPrompt) -> str:
    return ""


@obstacle.register
def _(defense: Shift) -> str:
    return CHANGES[Shift.method]


@obstacle.register
def _(defense: Projector) -> str:
    return CHANGES[Projector.method]


@obstacle.register
def _(defense: GuardAlign) -> str:
    if defense.prefix is None:
        return ""
    if defense.prefix.setting.placement == "answer":
        return (
            f"it begins the answer with {defense.prefix.setting.text!r}; take a variant of "
            "placement 'user'."
        )
    if defense.prefix.setting.gamma == 0:
        return ""
    return (
        f"it calibrates attention (gamma {defense.prefix.setting.gamma}); give "
        "defense.with_prefix(defense.prefix.with_gamma(0)), which keeps the words and the mask."
    )


@obstacle.register
def _(defense: Stack) -> str:
    return next(filter(None, map(obstacle, defense.defenses)), "")
