"""What is read for a prompt: files, then stdin, then `--prompt`; and how stdin is read."""

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from mistral_chat.cli import pipes
from mistral_chat.cli.main import request_of
from mistral_chat.cli.requests import ChatRequest
from mistral_chat.cli.talk.inputs import Inputs, read_inputs
from mistral_chat.errors import PromptError, UsageError

BOM = b"\xef\xbb\xbf"


def _options(*words: str) -> ChatRequest:
    return request_of(["MODEL", *words])


def end_it(handle: int) -> None:
    """Close a pipe's end, and keep its number taken."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, handle)
    os.close(null)


@contextmanager
def _stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, *, closes: bool = True) -> Iterator[int]:
    """Replace stdin by a pipe with some content; return its other end."""
    read, write = os.pipe()
    writer = threading.Thread(target=_write, args=(write, data, closes), daemon=True)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(fileno=lambda: read, isatty=lambda: False))
    writer.start()
    try:
        yield write
    finally:
        os.close(read)
        writer.join(60)
        if not closes:
            os.close(write)


def _write(handle: int, data: bytes, closes: bool) -> None:
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
    except BrokenPipeError:
        return
    finally:
        if closes:
            os.close(handle)


def _read(monkeypatch: pytest.MonkeyPatch, data: bytes, *words: str) -> str | None:
    with _stdin(monkeypatch, data):
        return read_inputs(_options(*words)).prompt


def test_prompt_is_files_then_stdin_then_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"file {name}\n")
    words = [f"--file={tmp_path / name}" for name in "ab"]
    expected = "file a\n\nfile b\n\npiped\n\n\nasked\n"
    assert _read(monkeypatch, b"piped\n\n", *words, "--prompt", "asked\n") == expected
    assert _read(monkeypatch, b"piped\n\n", "asked\n", *words) == expected


def test_prompt_alone_is_left_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _read(monkeypatch, b"", "--prompt", "  x \n") == "  x \n"


def test_byte_order_marks_are_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BOM + b"file")
    (tmp_path / "s").write_bytes(BOM + b"system")
    words = ["--file", f"{tmp_path}/a", "--system_file", f"{tmp_path}/s", "--instruct"]
    with _stdin(monkeypatch, BOM + b"piped"):
        inputs = read_inputs(_options(*words))
    assert (inputs.prompt, inputs.offered.system) == ("file\n\npiped", "system")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"caf\xe9", "stdin is not UTF-8 text: byte 0xe9 at offset 3"),
        ("café".encode("utf-16"), "stdin is not UTF-8 text: byte 0xff at offset 0"),
        (b"a\0b", "stdin holds a NUL byte at offset 1"),
        (b"", "stdin is empty"),
        (BOM, "stdin is empty"),
        (b"\r\n", "stdin is empty"),
    ],
)
def test_stdin_that_is_no_prompt_is_named(
    monkeypatch: pytest.MonkeyPatch, data: bytes, said: str
) -> None:
    with pytest.raises(PromptError, match=said):
        _read(monkeypatch, data)


@pytest.mark.parametrize("path", ["/", "/dev/zero"])
def test_stdin_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(fileno=lambda: handle, isatty=lambda: False))
    try:
        with pytest.raises(PromptError, match=r"stdin (cannot be read|has more than 64 MiB)"):
            read_inputs(_options())
    finally:
        os.close(handle)


def test_endless_stdin_is_refused_at_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        _stdin(monkeypatch, b"y\n" * (33 << 20), closes=False),  # a pipe that is never closed
        pytest.raises(PromptError, match="stdin has more than 64 MiB"),
    ):
        read_inputs(_options())


def test_closed_stdin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert read_inputs(_options("--prompt", "x")).prompt == "x"
    with pytest.raises(PromptError, match="stdin is closed"):
        read_inputs(_options())


@pytest.mark.parametrize("words", [["--prompt", "x"], ["x"], [], ["x", "--quiet"]])
def test_silent_stdin_is_waited_for_and_said(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """The note is printed once, and only if there is a prompt that needs no stdin."""
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    monkeypatch.setattr(pipes, "PATIENCE_S", 0.01)
    got: list[Inputs] = []
    with _stdin(monkeypatch, b"", closes=False) as other_end:
        reader = threading.Thread(target=lambda: got.append(read_inputs(_options(*words))))
        reader.start()
        is_told = "x" in words and "--quiet" not in words
        deadline = time.monotonic() + 60
        while is_told and "\n" not in said.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.write(other_end, b"piped")
        time.sleep(0.05)  # longer than it waits before it speaks
        end_it(other_end)
        reader.join(60)
    assert got[0].prompt == ("piped\n\nx" if "x" in words else "piped")
    expected = "mistral-chat: waiting for stdin to end, which comes before the prompt "
    assert said.getvalue().startswith(expected) is is_told
    assert said.getvalue().count("\n") == is_told


LONG = bytes(range(1, 128)) * 8257  # more than a pipe holds


@pytest.mark.parametrize("data", [b"", b"piped\n", BOM + "é\r\n".encode(), LONG])
def test_stdin_is_left_for_ranks_as_it_was(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Read here, then completely once more by a process that this one starts."""
    with _stdin(monkeypatch, data):
        first = read_inputs(_options("x"), for_ranks=True)
        copied = subprocess.run(["cat"], stdin=sys.stdin, capture_output=True, check=True)
        assert copied.stdout == data
        os.lseek(sys.stdin.fileno(), 0, os.SEEK_SET)
        assert read_inputs(_options("x")) == first


@pytest.mark.parametrize("flag", ["file", "system-file", "system_file", "json_schema", "config"])
@pytest.mark.parametrize("equals", [False, True])
def test_pipe_in_the_place_of_a_file_is_read_once_for_all(flag: str, equals: bool) -> None:
    """As with `--file <(command)`: ranks do not inherit it, and it can be read only once."""
    with _pipe(b"piped") as name:
        word = [f"--{flag}={name}"] if equals else [f"--{flag}", name]
        *_, kept = pipes.keep_pipes(["MODEL", "--instruct", *word], lambda _: None)
        assert kept.startswith(f"--{flag}=") is equals
        path = Path(kept.removeprefix(f"--{flag}="))
        assert path.read_text() == path.read_text() == "piped"
        cat = subprocess.run(["cat", path], capture_output=True, check=True)
        assert cat.stdout == b"piped"


@contextmanager
def _pipe(data: bytes) -> Iterator[str]:
    """Make what a shell's `<(command)` gives."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    try:
        yield f"/dev/fd/{read}"
    finally:
        os.close(read)


def test_pipe_without_a_writer_is_waited_for_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    monkeypatch.setattr(pipes, "PATIENCE_S", 0.01)
    writer = threading.Thread(target=path.write_bytes, args=[b"later"])
    said: list[str] = []

    def say(name: str) -> None:
        said.append(name)
        writer.start()

    kept = pipes.keep_pipes(["--file", str(path)], say)
    writer.join(60)
    assert Path(kept[1]).read_bytes() == b"later"
    assert said == [str(path)]


def test_other_words_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    with _pipe(b"not read") as pipe:
        files = ["--file", str(tmp_path / "a"), "--file=", "--file", "/dev/fd/987654", "--file"]
        texts = ["--instruct", pipe, "--prompt", pipe, f"--prompt={pipe}", f"--tools={pipe}"]
        words = [*texts, *files]
        assert pipes.keep_pipes(words, lambda _: None) == words
        assert Path(pipe).read_text() == "not read"


def test_terminal_without_a_prompt_is_a_chat(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    (tmp_path / "a").write_text("file\n")
    assert read_inputs(_options()).prompt is None
    assert read_inputs(_options("--prompt", "x")).prompt == "x"
    inputs = read_inputs(_options("--instruct", "--file", f"{tmp_path}/a"))
    assert (inputs.prompt, inputs.files) == (None, ("file",))
    with pytest.raises(PromptError, match="--json answers one prompt"):
        read_inputs(_options("--json"))


def test_resume_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="--resume goes on with a chat at a terminal"):
        read_inputs(_options("--instruct", "--resume"))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--prompt", "\udce9"], "prompt"),
        (["\udce9"], "prompt"),
        (["--stop", "\udce9", "x"], "stop"),
        (["--instruct", "--system", "\udce9", "x"], "system"),
    ],
)
def test_text_that_is_no_utf8_is_named(
    monkeypatch: pytest.MonkeyPatch, words: list[str], name: str
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(PromptError, match=f"--{name} is not UTF-8 text"):
        read_inputs(_options(*words))
