"""What a defense is: something that may rewrite a request and may change the model meanwhile."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, ProcessorMixin

from hauberk import UNDEFENDED
from hauberk.bundle import Binding, Card
from hauberk.requests import Request


class Defense(Protocol):
    """One armour, bound to nothing until it is applied."""

    method: str

    def rewrite(self, request: Request) -> Request:
        """Change images and messages, before the processor sees them.

        A defense that is faster on many at once has ``rewrite_all(requests) -> list`` as well.
        """
        ...

    def applied(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Change the model inside the ``with`` block; restored after it, also on error.

        Rows whose answers have ended may leave a batch while it is decoded: what is remembered of
        a prompt's rows is looked up through :func:`hauberk.decoding.rows_left`.
        """
        ...

    def save(self, folder: Path, binding: Binding, **about: Any) -> Path:
        """Write the bundle; ``about`` are the card's ``data`` and ``measurements``."""
        ...

    @classmethod
    def load(
        cls, home: Path, card: Card, model: PreTrainedModel, processor: ProcessorMixin
    ) -> "Defense":
        """Read a verified bundle; check its tensors' shapes against the model."""
        ...


class Undefended:
    """The defense that does nothing: the baseline of every comparison."""

    method = UNDEFENDED

    def rewrite(self, request: Request) -> Request:
        """Return the request as it is."""
        return request

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Leave the model as it is."""
        yield
