"""A bar that says how far something long is: on a terminal rich's, in a notebook tqdm's, elsewhere nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["Bar", "in_notebook", "watched"]

T = TypeVar("T")
SECONDS = 0.5  # between two drawings in a notebook, whose page many of them would freeze


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook: Jupyter, Colab, Kaggle."""
    from rich.console import Console

    return Console().is_jupyter


class Bar:
    """What is done of how much, a few words, and the time left.

    Args:
        name: what is done.
        total: steps in all; None: unknown.
        done: of them, before this.
        shown: False shows nothing anywhere.
        lasting: the bar stays when it is done.

    >>> with Bar("counting", 3, shown=False) as bar:
    ...     bar.advance(); bar.to(3); bar.say("done")
    """

    def __init__(
        self, name: str, total: int | None, *, done: int = 0, shown: bool = True, lasting: bool = False
    ) -> None:
        self.notebook: Any = None
        self.terminal: Any = None
        if shown and in_notebook():
            from tqdm.auto import tqdm

            self.notebook = tqdm(total=total, initial=done, desc=name, leave=lasting, mininterval=SECONDS)
        elif shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(stderr=True)
            if console.is_terminal:
                words = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
                rest = (TextColumn("{task.fields[text]}"), TimeRemainingColumn(), TextColumn("left"))
                self.terminal = Progress(*words, *rest, console=console, transient=not lasting)
                self.task = self.terminal.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> Bar:
        if self.terminal is not None:
            self.terminal.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal is not None:
            self.terminal.stop()
        if self.notebook is not None:
            self.notebook.close()

    def advance(self) -> None:
        """One step further."""
        if self.terminal is not None:
            self.terminal.advance(self.task)
        if self.notebook is not None:
            self.notebook.update(1)

    def to(self, done: int, total: int | None = None) -> None:
        """So many steps are done; `total` where it is known better now."""
        if self.terminal is not None:
            self.terminal.update(self.task, completed=done, **({} if total is None else {"total": total}))
        if self.notebook is not None:
            self.notebook.total = self.notebook.total if total is None else total
            self.notebook.update(done - self.notebook.n)

    def say(self, text: str) -> None:
        """A few words beside the bar."""
        if self.terminal is not None:
            self.terminal.update(self.task, text=text)
        if self.notebook is not None:
            self.notebook.set_postfix_str(text, refresh=False)


def watched(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar over them that goes when they are through.

    >>> list(watched("ab", "letters", total=2))
    ['a', 'b']
    """
    with Bar(name, total) as bar:
        for item in items:
            yield item
            bar.advance()
