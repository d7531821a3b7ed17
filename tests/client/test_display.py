"""What the command prints of texts that others have uploaded."""

from __future__ import annotations

import pytest
import typer

from engram import display
from engram.oversight import Bin, Histogram
from engram.schemas import Exemplar

NASTY = "a\x1b[2Jb\x9b31m\r\n\u202e[red]c"


def test_nothing_that_was_uploaded_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    each = Exemplar(pack="0" * 64, row=0, task=0, class_id=1, rank=0, bytes=5, quality=50, key=NASTY)
    display.exemplars([each])
    bins = [Bin(value=NASTY, low=None, high=None, exemplars=1)]
    display.histogram(Histogram(buffer="b", generation=1, of="field:x", exemplars=1, counted=1, others=0, bins=bins))
    display.say(NASTY)
    with pytest.raises(typer.Exit):
        display.fail(NASTY)
    printed = "".join(capsys.readouterr())
    assert not {"\x1b", "\x9b", "\r", "\u202e"} & set(printed)
    assert printed.count(r"a\x1b[2Jb\x9b31m\r") == 4
    assert printed.count("[red]c") == 4
