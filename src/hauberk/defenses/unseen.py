"""What a defense that works on requests does about pictures that it was never shown."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from hauberk.errors import UnsupportedRequest


class Unseen:
    """Keeps such a defense from standing by while a model reads what it did not work on.

    The model alone cannot tell a picture that was worked on from one that was not.  So this
    remembers whether the defense was shown anything since it was made: inside its ``with`` block a
    model that is given pictures before that is stopped.

    Parameters
    ----------
    who : the defense, as an error names it
    """

    def __init__(self, who: str) -> None:
        self.who, self.shown = who, False

    @contextmanager
    def refused(self, model: PreTrainedModel) -> Iterator[None]:
        """Refuse pictures while the block runs, as long as the defense was shown none.

        Raises
        ------
        UnsupportedRequest
            At the first of them.
        """

        def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            if not self.shown and _holds_pictures(kwargs):
                raise UnsupportedRequest(
                    f"{self.who} works on requests before the processor and was shown none, so "
                    "that this picture is not defended; ask with hauberk.respond(model, processor, "
                    "requests, defense), or process what defense.rewrite(request) returns."
                )

        with model.register_forward_pre_hook(look, with_kwargs=True):
            yield


def _holds_pictures(kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a model is given pictures: pixels, or what its tower saw before `generate`."""
    seen = kwargs.get("mm_encoder_outputs") or {}
    return kwargs.get("pixel_values") is not None or seen.get("image") is not None
