"""The command that resumes a chat is the one that was typed, and runs as printed."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from mistral_chat.cli.main import request_of
from mistral_chat.cli.talk.going_on import _as_typed, command_to_go_on

ID = "20261125-044448-6c9f"
OTHER = "20250101-000000-0000"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("mistral-chat M --instruct", f"mistral-chat M --instruct --resume {ID}"),
        ("mistral-chat demo", f"mistral-chat demo --resume {ID}"),
        ("c 'my model' --stop '$x'", f"c 'my model' --stop '$x' --resume {ID}"),
        (f"c M --resume {OTHER} --seed 1", f"c M --seed 1 --resume {ID}"),
        (f"c M --resume={OTHER} --seed 1", f"c M --seed 1 --resume {ID}"),
        ("c M --resume --seed 1", f"c M --seed 1 --resume {ID}"),
        ("c M --resume latest", f"c M --resume {ID}"),
        ("c M --file a --file=b --system S --system-file f -x", f"c M -x --resume {ID}"),
        ("c M --reasoning high --show_thinking", f"c M --show_thinking --resume {ID}"),
        ("c --instruct -- --odd", f"c --instruct --resume {ID} -- --odd"),
        (
            "torchrun --nproc-per-node 8 --no-python mistral-chat M --instruct",
            f"torchrun --nproc-per-node 8 --no-python mistral-chat M --instruct --resume {ID}",
        ),
    ],
)  # fmt: skip
def test_command_goes_on_with_the_chat(typed: str, expected: str) -> None:
    assert command_to_go_on(shlex.split(typed), ID) == expected


def test_chat_of_another_folder_is_named_by_its_file() -> None:
    command = command_to_go_on(["mistral-chat", "M", "--instruct"], "/a folder/chat.jsonl")
    assert shlex.split(command)[-1] == "--resume=/a folder/chat.jsonl"
    options = request_of(shlex.split(command)[1:])
    assert options.resume == "/a folder/chat.jsonl"


def test_program_is_named_as_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "mistral-chat"
    script.write_text("#!/usr/bin/env python3\n")
    words = ["M", "--instruct"]
    # A script that cannot be run by itself needs the interpreter.
    assert _as_typed([sys.executable, str(script), *words])[1:] == [str(script), *words]
    script.chmod(0o700)
    for switches in ([], ["-P"], ["-I", "-u"]):
        full = ["/usr/bin/python3", *switches, str(script), *words]
        monkeypatch.setenv("PATH", "/nowhere")
        assert _as_typed(full) == [str(script), *words]
        monkeypatch.setenv("PATH", f"/nowhere{os.pathsep}{tmp_path}")
        assert _as_typed(full) == ["mistral-chat", *words]
    as_module = ["python", "-m", "mistral_chat", *words]
    assert _as_typed(as_module) == as_module
