"""Files that a person names: byte order marks, pipes, limits, line ends."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_chat.chat.grammar import read_grammar
from mistral_chat.chat.tools import read_tools
from mistral_chat.cli.console.texts import read_text_file, text_of
from mistral_chat.cli.main import request_of
from mistral_chat.cli.talk.inputs import read_inputs
from mistral_chat.config import read_preset
from mistral_chat.errors import PromptError
from mistral_chat.files import read_small_file

BOM = b"\xef\xbb\xbf"
READERS: list[tuple[str, Callable[[Path], Any], bytes]] = [
    ("text", read_text_file, "héllo\n".encode()),
    ("tools.json", read_tools, b'[{"name": "f"}]'),
    ("schema", lambda path: read_grammar(path)._lark, b'{"type": "null"}'),
    ("preset", read_preset, b"[run]\ninstruct = true\n"),
]


@pytest.fixture
def pipe() -> Iterator[Callable[[bytes], Path]]:
    """Make what a shell's `<(command)` gives: the name of a pipe that may still be written to."""
    opened: list[int] = []
    writers: list[threading.Thread] = []

    def make(data: bytes) -> Path:
        reader, writer = os.pipe()
        opened.append(reader)

        def write() -> None:
            with os.fdopen(writer, "wb") as file:
                file.write(data)

        writers.append(threading.Thread(target=write))
        writers[-1].start()
        return Path(f"/dev/fd/{reader}")

    yield make
    for reader in opened:
        os.close(reader)
    for thread in writers:
        thread.join()


@pytest.mark.parametrize(("name", "read", "data"), READERS)
def test_byte_order_mark_is_no_part_of_any_file(
    tmp_path: Path, name: str, read: Callable[[Path], Any], data: bytes
) -> None:
    path = tmp_path / name
    found = []
    for begin in (b"", BOM):
        path.write_bytes(begin + data)
        found.append(read(path))
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "read", "data"), [r for r in READERS if r[0] != "tools.json"])
def test_pipe_stands_in_the_place_of_any_file(
    tmp_path: Path,
    pipe: Callable[[bytes], Path],
    name: str,
    read: Callable[[Path], Any],
    data: bytes,
) -> None:
    (tmp_path / name).write_bytes(data)
    assert read(pipe(BOM + data)) == read(tmp_path / name)


def test_pipe_is_read_to_its_end_and_no_further_than_its_bound(
    pipe: Callable[[bytes], Path],
) -> None:
    data = bytes(range(1, 256)) * 4000  # far more than a pipe holds
    assert read_small_file(pipe(data), PromptError, len(data), pipes=True) == data
    with pytest.raises(PromptError, match="has more than 9 bytes"):
        read_small_file(pipe(b"0123456789"), PromptError, 9, pipes=True)


def test_pipe_that_is_opened_before_its_writer_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[b"later"])
    reader: list[str] = []
    thread = threading.Thread(target=lambda: reader.append(read_text_file(path)))
    thread.start()
    writer.start()
    thread.join()
    writer.join()
    assert reader == ["later"]


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_device_is_no_text(name: str) -> None:
    with pytest.raises(PromptError, match="no regular file: expected a file on a disk or a pipe"):
        read_text_file(Path(name))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\n", "a"),
        (b"a\r\n", "a"),
        (b"a\n\n", "a\n"),
        (b"a ", "a "),
        (BOM + b"a\n", "a"),
        (BOM + BOM, "\ufeff"),
        (b"a" + BOM, "a\ufeff"),
    ],
)
def test_one_line_end_is_no_part_of_a_text(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "x").write_bytes(data)
    assert read_text_file(tmp_path / "x") == text_of(data, "stdin") == text


def test_every_part_of_a_prompt_is_read_alike(
    tmp_path: Path, pipe: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(BOM + b"of a file\n")
    (tmp_path / "stdin").write_bytes(BOM + b"of stdin\n")
    stdin = (tmp_path / "stdin").open()
    monkeypatch.setattr(sys, "stdin", stdin)
    words = ["MODEL", "--file", str(tmp_path / "x"), "--file", str(pipe(BOM + b"of a pipe\n"))]
    options = request_of([*words, "--prompt", "of a flag"])
    with stdin:
        prompt = read_inputs(options).prompt
    assert prompt == "of a file\n\nof a pipe\n\nof stdin\n\nof a flag"
