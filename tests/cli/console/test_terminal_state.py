"""A terminal's state, read before or after another rank has changed it."""

import os
import sys
import termios

import pytest

from mistral_chat.cli.console import terminal_state
from mistral_chat.cli.console.terminal import QuietTerminal
from mistral_chat.cli.console.terminal_state import TerminalState


@pytest.mark.parametrize("taken", ["before", "after"])
def test_terminal_that_a_rank_left_quiet_is_put_back(
    monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(terminal_state, "in_foreground", lambda: True)
        before = termios.tcgetattr(slave)
        state = TerminalState()
        QuietTerminal().__enter__()  # by a rank that is killed
        if taken == "after":
            state = TerminalState()
        assert state.is_changed()
        assert termios.tcgetattr(slave) != before
        state.put_back()
        assert termios.tcgetattr(slave) == before
        assert not state.is_changed()
    QuietTerminal.in_use = None
    os.close(master)
