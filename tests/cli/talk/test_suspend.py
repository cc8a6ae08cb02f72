"""Ctrl-Z returns to the shell, and `fg` resumes; without a shell nothing happens."""

import sys
from pathlib import Path

import pexpect

from tests.conftest import ROOT, command_env
from tests.terminal import typed_at

TAKES_HOLD = "\x1b\\[\\?2004h"


def test_ranks_are_suspended_at_the_prompt_and_in_an_answer(
    roomy_folder: Path, tmp_path: Path
) -> None:
    child = pexpect.spawn(
        "bash",
        ["--norc", "--noediting", "-i"],
        encoding="utf-8",
        codec_errors="replace",
        timeout=60,
        dimensions=(40, 100),
        cwd=str(ROOT),
        env=command_env(  # type: ignore[arg-type]
            TERM="xterm", PS1="shell> ", PROMPT_TOOLKIT_NO_CPR="1", XDG_DATA_HOME=str(tmp_path)
        ),
    )
    child.delaybeforesend = None
    child.expect("shell> ")
    words = [str(roomy_folder), "--instruct", "--seed", "5", "--nproc_per_node", "2"]
    child.sendline(f"{sys.executable} -m mistral_chat {' '.join(words)}; echo code $?")
    child.expect(TAKES_HOLD)
    child.send("half")
    child.send("\x1a")
    child.expect("Stopped")
    child.expect("shell> ")
    child.sendline("stty -a | grep -q ' icanon' && echo 'as before'")
    child.expect("as before\r\n")
    child.sendline("fg")
    child.expect(TAKES_HOLD)
    child.expect("half")  # the draft is there again
    child.send(" a word\r")
    child.expect("\x1b\\[\\?2004l")
    child.expect("[a-z]{3}")
    child.send("\x1a")
    child.expect("Stopped")
    child.expect("shell> ")  # earlier input would be lost with its Ctrl-C
    child.sendline("fg")
    child.expect(r"nproc_per_node 2\r\n")
    child.expect("[a-z]{3}")
    child.sendintr()
    child.expect("mistral-chat: interrupted")
    child.expect(TAKES_HOLD)
    child.sendeof()
    child.expect("shell> ")
    child.close(force=True)


def test_nothing_happens_and_nothing_is_typed_where_no_shell_is(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with typed_at(tmp_path, "mistral_chat", tiny_folder, "--instruct", "--quiet") as child:
        child.expect(TAKES_HOLD)
        child.send("/a\x1ab\r")
        child.expect("unknown command /ab")
        child.expect(TAKES_HOLD)
        child.sendeof()
        child.expect(pexpect.EOF)
