# SPDX-License-Identifier: GPL-2.0-or-later
"""What a person sees while assets are made: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

__all__ = ["Progress"]


class Progress:
    """Reports steps to standard error, which leaves standard output to results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False)

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[float, str], None]]:
        """A step of work; yields ``report(fraction, detail)``, fraction from 0 to 1."""
        began = time.monotonic()
        if not self._console.is_terminal:
            self.say(f"{title} ...")
            yield lambda fraction, detail: None
        else:
            with Bars(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                      TimeElapsedColumn(), TextColumn("{task.fields[detail]}"),
                      console=self._console, transient=True) as bars:
                task = bars.add_task(title, total=1.0, detail="")
                yield lambda fraction, detail: bars.update(
                    task, completed=fraction, detail=detail[-40:])
        self.say(f"{title}: done in {time.monotonic() - began:.1f} s")
