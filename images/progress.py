# SPDX-License-Identifier: GPL-2.0-or-later
"""What a person sees while assets are made: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

__all__ = ["Progress", "Report"]

#: Called with how much is done, from 0 to 1, and with what is being done.
Report = Callable[[float, str], None]


class Progress:
    """Reports steps to standard error, which leaves standard output to results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, emoji=False)
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            transient=True,
        )

    def say(self, text: str) -> None:
        """One line, however long: people and tests search for it."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Report]:
        """A step of work, which may have steps of its own; yields how to report on it."""
        began = time.monotonic()
        if self._console.is_terminal:
            with self._bar(title) as report:
                yield report
        else:
            self.say(f"{title} ...")
            yield _ignore
        self.say(f"{title}: done in {time.monotonic() - began:.1f} s")

    @contextmanager
    def _bar(self, title: str) -> Iterator[Report]:
        # One display for all bars: a terminal can have no second one.
        if not self._bars.tasks:
            self._bars.start()
        # Without a total, a bar shows that something happens until somebody reports how much.
        task = self._bars.add_task(title, total=None, detail="")

        def report(fraction: float, detail: str) -> None:
            self._bars.update(task, total=1.0, completed=fraction, detail=detail[-40:])

        try:
            yield report
        finally:
            self._bars.remove_task(task)
            if not self._bars.tasks:
                self._bars.stop()


def _ignore(_fraction: float, _detail: str) -> None:
    pass
