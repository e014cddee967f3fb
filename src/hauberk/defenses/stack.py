"""Several defenses, one after the other."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel

from hauberk.requests import Request, SupportsDefense


class Stack:
    """Defenses in the order in which they act.

    A request passes through them from first to last, so what looks at the picture that a user sent,
    such as a mask, comes before what changes its looks, such as a frame.  The model is changed by
    the first one first.

    Parameters
    ----------
    defenses : one or more

    Raises
    ------
    ValueError
        If there is none.
    """

    method = "stack"

    def __init__(self, defenses: Sequence[SupportsDefense]) -> None:
        if not defenses:
            raise ValueError("a stack of nothing; give one defense or more.")
        self.defenses = tuple(defenses)

    def rewrite(self, request: Request) -> Request:
        """Change a request by every defense in turn."""
        return self.rewrite_all([request])[0]

    def rewrite_all(self, requests: Sequence[Request]) -> list[Request]:
        """Change many at once, where a defense can."""
        changed = list(requests)
        for defense in self.defenses:
            together = getattr(defense, "rewrite_all", None)
            changed = together(changed) if together else [defense.rewrite(each) for each in changed]
        return changed

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Change the model by every defense in turn; restored in reverse, also on error."""
        with ExitStack() as stack:
            for defense in self.defenses:
                stack.enter_context(defense.applied(model))
            yield
