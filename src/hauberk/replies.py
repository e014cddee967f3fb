"""What comes back from an endpoint: answers, refusals, errors, and the file that keeps answers."""

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from hauberk.errors import BadData

_FILTERED = {
    "content_filter",  # OpenAI, Azure
    "content_policy_violation",  # OpenAI
    "data_inspection_failed",  # Alibaba
    "moderation_blocked",  # OpenAI, images
}
"""Codes of errors by which a provider's filter refuses one request."""
_LARGEST = 16 * 2**20
"""Bytes of a body that are read at most; an answer of 100,000 tokens has half a million."""


@dataclass(frozen=True)
class Reply:
    """What came of one request: an answer, a refusal to answer, or neither."""

    text: str = ""
    """The answer; of a refusal, its words."""
    refused: bool = False
    """The endpoint marks it as no answer: the model declined, or a filter of the provider did."""
    error: str = ""
    """Why there is none, after all tries; "" otherwise."""
    tokens_in: int | None = None
    """None where the server did not count."""
    tokens_out: int | None = None
    cost: float = 0.0
    """What the answer has cost when it was made."""
    seconds: float = 0.0
    """Of the last try."""
    day: str = ""
    """On which it came, as 2026-11-28 in UTC; "" where that was not kept."""
    cached: bool = False


class NoAnswer(Exception):
    """There is no answer yet; another try may bring one."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def spellings(secret: str) -> str:
    r"""Write the expression that finds a secret of ASCII in whatever way a body may spell it.

    JSON may escape any character (``\u002B``, ``\/``: RFC 8259, 7), once more for every JSON that
    is quoted in another.
    """
    # Bounds keep the search linear: 8 backslashes are three JSONs in one another.
    escape = r"\\{0,8}"
    return "".join(rf"{escape}(?:{re.escape(each)}|u(?i:{ord(each):04x}))" for each in secret)


async def read_body(response: httpx.Response) -> bytes:
    """Read a body to its end, unless it has none; UTF-16 and UTF-32 become UTF-8."""
    read = bytearray()
    async for part in response.aiter_bytes():
        read += part
        if len(read) > _LARGEST:
            raise NoAnswer(f"an answer of more than {_LARGEST} bytes")
    coding = json.detect_encoding(read)
    return bytes(read) if coding.startswith("utf-8") else read.decode(coding, "replace").encode()


def retry_after(value: str) -> float | None:
    """Read Retry-After, which is seconds or a date (RFC 9110, 10.2.3); None for anything else."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:  # "-0000" says that the zone is not known; HTTP has no other than UTC
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def read_completion(raw: bytes) -> Reply:
    """Read a chat completion.

    Raises
    ------
    NoAnswer
        If it is none: it may be cut, or the work of something in between.
    """
    body = _json(raw)
    if not isinstance(body, Mapping):
        raise NoAnswer(f"no JSON object but {_shown(raw)}")
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise NoAnswer(f"no choices[0].message in {_shown(raw)}")
    declined = message.get("refusal") or ""
    text = _text(message.get("content", None if declined else ...))
    if text is None or not isinstance(declined, str):
        raise NoAnswer(f"no text in choices[0].message of {_shown(raw)}")
    counted = body.get("usage")
    usage: Mapping[str, Any] = counted if isinstance(counted, Mapping) else {}
    return Reply(
        text=text or _plain(declined),
        refused=bool(declined) or choice.get("finish_reason") == "content_filter",
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
    )


def _text(content: Any) -> str | None:
    """Read what a message says, which is a text, parts with texts, or null for nothing said."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _plain(content)
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return _plain("".join(texts)) if len(texts) == len(parts) else None


def _plain(text: str) -> str:
    """Replace halves of characters, which JSON can spell and no file or tokenizer can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _shown(raw: bytes) -> str:
    return repr(raw[:200].decode("utf-8", "replace")) if raw.strip() else "nothing"


@dataclass(frozen=True)
class ErrorBody:
    """What the body of an error says."""

    message: str
    code: str = ""
    filtered: bool = False

    @classmethod
    def of(cls, raw: bytes) -> "ErrorBody":
        """Read one of any form, or of none."""
        body = _json(raw)
        error = body.get("error") if isinstance(body, Mapping) else None
        if not isinstance(error, Mapping):
            return cls(_shown(raw))
        about = error.get("metadata")
        flagged = isinstance(about, Mapping) and "flagged_input" in about  # OpenRouter's 403
        codes = {str(error.get("code")), str(error.get("type"))}
        message = error.get("message")
        return cls(
            message=_plain(message)[:500] if isinstance(message, str) else _shown(raw),
            code="insufficient_quota" if "insufficient_quota" in codes else str(error.get("code")),
            filtered=flagged or bool(codes & _FILTERED),
        )


class ReplyCache:
    """Answers by the hash of what was asked, in one SQLite file.

    Every answer is a transaction of its own, so that a kill loses none that was kept, and several
    processes may read and write.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        with self._cured():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
            try:
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS replies (asked TEXT PRIMARY KEY, reply TEXT)"
                )
            except sqlite3.Error:
                self._file.close()
                raise

    def get(self, key: str) -> Reply | None:
        """Find an answer."""
        with self._cured():
            found = self._file.execute("SELECT reply FROM replies WHERE asked = ?", (key,))
            row = found.fetchone()
            return Reply(**json.loads(row[0]), cached=True) if row else None

    def put(self, key: str, reply: Reply) -> None:
        """Keep an answer, if another process has not done so meanwhile."""
        told = asdict(reply)
        del told["cached"], told["cost"]  # prices may change
        with self._cured():
            self._file.execute(
                "INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(told))
            )

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    @contextmanager
    def _cured(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, TypeError, ValueError) as error:
            raise BadData(
                f"{self._path}: cannot serve as a cache of answers ({error}); name another file as "
                "`cache`, or delete it."
            ) from None
