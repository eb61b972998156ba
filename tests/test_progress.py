"""Bars: tqdm's in a notebook, rich's on a terminal, nothing elsewhere."""

from __future__ import annotations

import builtins
import io

import pytest
import rich.console

from vicinal.progress import Bar, in_notebook, watched


def kernel(name: str, module: str) -> object:
    return type(name, (), {"__module__": module})()


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        (kernel("ZMQInteractiveShell", "ipykernel.zmqshell"), True),
        (kernel("Shell", "google.colab._shell"), True),
        (kernel("TerminalInteractiveShell", "IPython.terminal"), False),
    ],
)
def test_notebooks_are_known(monkeypatch: pytest.MonkeyPatch, shell: object, expected: bool) -> None:
    assert not in_notebook()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    assert in_notebook() is expected


def test_a_notebook_gets_tqdms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vicinal.progress.in_notebook", lambda: True)
    with Bar("training", 4, done=1, lasting=True) as bar:
        bar.advance()
        bar.say("loss 0.500")
        bar.to(4)
        assert bar.notebook.n == 4
        assert bar.notebook.mininterval >= 0.5, "or the page freezes"
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "4/4" in shown
    assert "loss 0.500" in shown
    assert list(watched([1, 2], "drawing", 2)) == [1, 2]
    assert "drawing" in capsys.readouterr().err


def test_a_terminal_gets_richs(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    class Terminal(rich.console.Console):
        def __init__(self, **settings: object) -> None:
            super().__init__(file=screen, force_terminal=True, force_jupyter=False, width=100)

    monkeypatch.setattr(rich.console, "Console", Terminal)
    with Bar("embedding", None, lasting=True) as bar:
        bar.to(2, 5)
        bar.advance()
        bar.say("so far")
    assert "embedding" in screen.getvalue()
    assert "3/5" in screen.getvalue()
    assert "so far" in screen.getvalue()


def test_elsewhere_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("training", 2) as bar:
        bar.advance()
    monkeypatch.setattr("vicinal.progress.in_notebook", lambda: True)
    with Bar("training", 2, shown=False) as bar:
        bar.advance()
    said = capsys.readouterr()
    assert said.out == said.err == ""
