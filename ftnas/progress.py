"""Progress of long work: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 15.0

console = Console(stderr=True, highlight=False)
"""Where progress and warnings go; results go to the standard output."""


class Tracker:
    """Counts finished units of one piece of work."""

    def __init__(self, description: str, total: int, *, done: int, after_s: float, bar: Progress | None) -> None:
        self._description = description
        self._total = total
        self._first = self._done = done
        self._after_s = after_s
        self._bar = bar
        self._task = bar.add_task(description, total=total, completed=done, status="") if bar is not None else None
        self._begun = self._said = time.monotonic()

    def advance(self, status: str = "", *, num: int = 1) -> None:
        """Count ``num`` more units; ``status`` is shown beside the bar."""
        self._done += num
        now = time.monotonic()
        if now - self._begun < self._after_s:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, status=status)
            self._bar.start()
        elif now - self._said > LINE_EVERY_S or self._done == self._total:
            self._said = now
            left = (now - self._begun) / (self._done - self._first) * (self._total - self._done)
            ahead = f", about {left:.0f} s left" if self._done < self._total else ""
            console.print(f"{self._description}: {self._done}/{self._total}{ahead}  {status}", soft_wrap=True)


@contextmanager
def track(description: str, total: int, *, done: int = 0, after_s: float = 0.0) -> Iterator[Tracker]:
    """Show progress of ``total`` units while the body runs.

    Args:
        description: What is counted.
        total: Number of units.
        done: Of them done already (a resumed run).
        after_s: Work that takes fewer seconds shows nothing.
    """
    if not console.is_terminal:
        yield Tracker(description, total, done=done, after_s=after_s, bar=None)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    bar = Progress(*columns, console=console)
    if after_s == 0.0:
        bar.start()
    try:
        yield Tracker(description, total, done=done, after_s=after_s, bar=bar)
    finally:
        bar.stop()


def redirect(file: IO[str]) -> None:
    """Send progress, in lines, and warnings to a file from now on."""
    console.file = file


def say(message: str) -> None:
    """Print one line about what happens."""
    console.print(message, soft_wrap=True, markup=False)
