"""The only way to read small files written by others: regular, of limited size, UTF-8.

A FIFO, a device, a link to /dev/zero or a sparse terabyte must neither hang the program nor fill
its memory. A pipe is accepted only if a person names the file, as with a shell's `<(command)`.
Deep nesting and numbers with thousands of digits must not end in a traceback. Knows nothing of
what the files mean.
"""

import json
import math
import os
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral_chat.errors import MistralChatError, shown

__all__ = [
    "SMALL_FILE_BYTES",
    "decode_text",
    "is_there",
    "open_regular",
    "parse_json",
    "read_json",
    "read_json_object",
    "read_small_file",
    "read_text",
    "read_toml",
]

SMALL_FILE_BYTES = 64 << 20
MOST_DIGITS = 30  # of an integer; 2^64 has 20
_BOM = b"\xef\xbb\xbf"
_LFS = b"version https://git-lfs"

Error = type[MistralChatError]


def is_there(path: Path) -> bool:
    """Return whether a path exists, following links; True if that may not be looked at."""
    try:
        path.stat()
    except PermissionError:  # reading it will report the error
        return True
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return False
    return True


@contextmanager
def open_regular(path: Path, error: Error, *, pipes: bool = False) -> Iterator[tuple[int, int]]:
    """Open a regular file of any size for reading.

    Args:
        path: the file; links are followed.
        error: the type to raise, also for OSErrors inside the block.
        pipes: whether to accept a pipe, of size 0, which may have to wait for a writer.

    Yields:
        the file descriptor, and the size in bytes.

    Raises:
        MistralChatError: of type `error`: the file does not exist, is not regular, cannot be read,
            or is a Git LFS pointer.
    """
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would block.
        waits = 0 if pipes else os.O_NONBLOCK
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | waits)
    except FileNotFoundError:
        raise error(f"{path} does not exist: expected a file") from None
    except (OSError, ValueError) as failure:  # ValueError: a NUL byte in the path
        reason = failure.strerror if isinstance(failure, OSError) else str(failure)
        raise error(f"{path} cannot be read ({reason})") from failure
    try:
        status = os.fstat(fd)
        is_regular = stat.S_ISREG(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            raise error(f"{path} is a folder: expected a file")
        if not is_regular and not (pipes and stat.S_ISFIFO(status.st_mode)):
            also = " or a pipe" if pipes else ""
            raise error(f"{path} is no regular file: expected a file on a disk{also}")
        if is_regular and os.pread(fd, len(_LFS), 0) == _LFS:
            raise error(
                f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`, "
                f"or with `mistral-chat download`"
            )
        yield fd, status.st_size
    except OSError as failure:
        raise error(f"{path} cannot be read ({failure.strerror})") from failure
    finally:
        os.close(fd)


def read_small_file(
    path: Path, error: Error, most_bytes: int = SMALL_FILE_BYTES, *, pipes: bool = False
) -> bytes:
    """Read a regular file whole.

    Args:
        path: the file; links are followed.
        error: the type to raise.
        most_bytes: longer files are refused.
        pipes: whether to accept a pipe, and wait for its end.

    Raises:
        MistralChatError: of type `error`: as in `open_regular`, or the file is too long.
    """
    with open_regular(path, error, pipes=pipes) as (fd, size):
        if size > most_bytes:
            raise error(f"{path} has {size:,} bytes: expected at most {most_bytes:,}")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(most_bytes + 1)
    if len(data) > most_bytes:  # a pipe, or a file that has grown
        raise error(f"{path} has more than {most_bytes:,} bytes: expected no more")
    return data


def decode_text(data: bytes, where: str, error: Error) -> str:
    """Decode UTF-8 text and drop a byte order mark.

    Raises:
        MistralChatError: of type `error`: not UTF-8, or contains a NUL byte.
    """
    begin = len(_BOM) if data.startswith(_BOM) else 0
    try:
        text = data[begin:].decode("utf-8")
    except UnicodeDecodeError as failure:
        at = begin + failure.start
        raise error(
            f"{where} is not UTF-8 text: byte 0x{data[at]:02x} at offset {at}; expected UTF-8 "
            f"(iconv -f latin1 -t utf-8 may help)"
        ) from failure
    if "\0" in text:
        raise error(f"{where} holds a NUL byte at offset {data.index(0)}: expected text")
    return text


def read_text(
    path: Path, error: Error, most_bytes: int = SMALL_FILE_BYTES, *, pipes: bool = False
) -> str:
    """Read a file as text; arguments and errors as in `read_small_file` and `decode_text`."""
    return decode_text(read_small_file(path, error, most_bytes, pipes=pipes), str(path), error)


def read_json(
    path: Path, error: Error, most_bytes: int = SMALL_FILE_BYTES, *, pipes: bool = False
) -> Any:
    """Read a file as JSON; arguments and errors as in `read_text` and `parse_json`."""
    return parse_json(read_text(path, error, most_bytes, pipes=pipes), str(path), error)


def read_json_object(path: Path, error: Error) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        MistralChatError: of the type `error`: as `read_json`, or another kind of value.
    """
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: found a {type(value).__name__}, expected a JSON object")
    return value


def parse_json(text: str, where: str, error: Error) -> Any:
    """Parse JSON strictly.

    Raises:
        MistralChatError: of type `error`: not JSON, nested too deeply, NaN or Infinity, a
            duplicate name in an object, or a number out of range.
    """

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise error(f"{where} holds a number of {len(digits)} digits: expected at most 30")
        return int(digits)

    def fraction(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise error(f"{where} holds the number {shown(digits)}: expected one below 1e308")
        return value

    def constant(name: str) -> None:
        raise error(f"{where} holds {name}, which is no JSON: expected a number or null")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise error(f"{where} holds the name {shown(twice)} twice in one object")
        return value

    try:
        return json.loads(
            text,
            parse_int=whole,
            parse_float=fraction,
            parse_constant=constant,
            object_pairs_hook=members,
        )
    except json.JSONDecodeError as failure:
        raise error(
            f"{where} is not JSON: {failure.msg} in line {failure.lineno}, column {failure.colno}"
        ) from failure
    except RecursionError:
        raise error(f"{where} is nested too deeply: expected a few hundred levels") from None


def read_toml(
    path: Path, error: Error, most_bytes: int = 1 << 20, *, pipes: bool = False
) -> dict[str, Any]:
    """Read a file as TOML; arguments as in `read_text`.

    Raises:
        MistralChatError: of type `error`: as in `read_text`, or not TOML.
    """
    text = read_text(path, error, most_bytes, pipes=pipes)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as failure:
        raise error(f"{path} is not TOML: {failure}") from failure
    except (RecursionError, ValueError) as failure:  # ValueError: a number of 5,000 digits
        raise error(f"{path} cannot be read as TOML ({type(failure).__name__})") from None
