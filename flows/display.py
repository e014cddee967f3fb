"""What a person sees while stages run: a line a stage at a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.driver import Event, Listener

SAYS = {
    "waiting": ("·", "dim", "waiting"),
    "running": ("▸", "cyan", "running"),
    "Skipped": ("=", "dim", "cached: unchanged"),
    "Cached": ("↺", "blue", "cached: restored"),
    "Completed": ("✓", "green", "completed"),
    "Failed": ("✗", "bold red", "failed"),
    "retrying": ("↻", "yellow", "waits to try again"),
    "interrupted": ("■", "yellow", "interrupted"),
    "upstream failed": ("-", "yellow", "skipped: upstream failed"),
}
TALKATIVE = ("running",)


@dataclass
class Board:
    """The last event of each stage."""

    console: Console
    events: dict[str, Event] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, event: Event) -> None:
        """Note an event; without a terminal, print a line when the state changes."""
        with self.guard:
            before = self.events.get(event.stage)
            self.events[event.stage] = event
            self.since.setdefault(event.stage, time.monotonic())
            changed = before is None or before.state != event.state
        if changed and event.state != "waiting" and not self.console.is_terminal:
            self.console.print(_line(event), soft_wrap=True)

    def __rich__(self) -> Table:
        """Draw the stages."""
        table = Table.grid(padding=(0, 2))
        with self.guard:
            events = list(self.events.values())
        for event in events:
            mark, style, state = SAYS[event.state]
            took = f"{event.seconds:.1f} s" if event.seconds else ""
            says = event.says.splitlines()[0][:80] if event.says else ""
            cells = (Text(mark, style), Text(event.stage, style), Text(state, style), Text(took))
            table.add_row(*cells, Text(says, "dim", no_wrap=True, overflow="ellipsis"))
        return table


def _line(event: Event) -> Text:
    mark, style, state = SAYS[event.state]
    took = f"  {event.seconds:.1f} s" if event.seconds else ""
    says = f"  {event.says.splitlines()[0]}" if event.says else ""
    return Text(f"{mark} {event.stage}  {state}{took}{says}", style)


@contextmanager
def showing(stages: Sequence[str] = (), console: Console | None = None) -> Iterator[Listener]:
    """Show what happens until the block ends.

    Parameters
    ----------
    stages : sequence of str
        Those that will be heard of, in the order of their lines.
    console : rich.console.Console, optional
        Default: standard error, so that standard output stays for results.
    """
    board = Board(console or Console(stderr=True))
    for name in stages:
        board(Event(name, "waiting"))
    if not board.console.is_terminal:
        yield board
        return
    with Live(board, console=board.console, refresh_per_second=8):
        yield board
