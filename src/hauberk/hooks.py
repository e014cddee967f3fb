"""Reading and changing hidden states: the only code that touches forward hooks.

All work on *block outputs*, the residual stream after a decoder block, of shape
(batch, positions, hidden size) and the model's dtype.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]
"""Takes a block's output and returns what the next block shall see."""


@contextmanager
def editing(blocks: Sequence[nn.Module], edits: Mapping[int, Edit]) -> Iterator[None]:
    """Change the output of some blocks while the ``with`` block runs, and no longer."""
    with ExitStack() as stack:
        for index, edit in edits.items():
            # First in line: transformers keeps hooks of its own on the blocks to serve
            # `output_hidden_states`, and would otherwise report unedited states.
            hook = blocks[index].register_forward_hook(_replace(edit), prepend=True)
            stack.enter_context(hook)  # a handle removes itself, also after an error
        yield


@contextmanager
def recording(
    blocks: Sequence[nn.Module], keep: Callable[[Tensor], Tensor]
) -> Iterator[list[list[Tensor]]]:
    """Collect ``keep(output)`` of every block, as the next block sees it.

    Yields one list a block; every forward pass inside the ``with`` block appends to each.
    ``keep`` selects what is wanted at once (such as the last position), so that a pass over long
    prompts does not hold every state.
    """
    seen: list[list[Tensor]] = [[] for _ in blocks]
    with ExitStack() as stack:
        for block, kept in zip(blocks, seen, strict=True):
            stack.enter_context(block.register_forward_hook(_append(kept, keep)))
        yield seen


@contextmanager
def entering(block: nn.Module, keep: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Collect ``keep(input)`` of a block; that of the first one is what embeddings become."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(keep(_entered(args, kwargs)))

    with block.register_forward_pre_hook(hook, with_kwargs=True):
        yield seen


@contextmanager
def bypassing(blocks: Sequence[nn.Module], layers: Collection[int]) -> Iterator[None]:
    """Pass on what enters some blocks in place of what they put out.

    The blocks are computed all the same, so that a cache gets their keys and values and keeps its
    length.
    """

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return _replace(lambda _: _entered(args, kwargs))(_module, args, output)

    with ExitStack() as stack:
        for layer in layers:
            # First in line, as in `editing`.
            handle = blocks[layer].register_forward_hook(hook, with_kwargs=True, prepend=True)
            stack.enter_context(handle)
        yield


@contextmanager
def standing_in(block: nn.Module, states: Tensor) -> Iterator[None]:
    """Let what comes behind a block see these states, whatever else edits its output."""
    with block.register_forward_hook(_replace(lambda _: states)):  # last in line
        yield


def run_to(block: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """Run a forward pass no further than ``block`` and return what that puts out.

    Neither the blocks after it nor the head are computed, and no gradient graph of theirs is kept.

    Raises
    ------
    RuntimeError
        If the pass ends without reaching the block.
    """
    with block.register_forward_hook(_stop):
        try:
            forward()
        except _Reached as reached:
            return reached.states
    raise RuntimeError(f"the forward pass did not reach the {type(block).__name__} to stop at.")


class _Reached(Exception):
    """Leaves a forward pass with the output of the block that it was to run to."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _entered(args: Any, kwargs: Any) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]  # as every decoder names them
    return states


def _stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)


def _replace(edit: Edit) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        # transformers 5 returns the tensor itself, transformers 4 a tuple that starts with it
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return hook


def _append(kept: list[Tensor], keep: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept.append(keep(output[0] if isinstance(output, tuple) else output))

    return hook
