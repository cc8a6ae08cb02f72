"""A batch's OUT: records written whole and synced one by one, and those of an earlier run.

OUT is its own journal: a later run continues with the lines that it lacks. To retry lines, their
error records are removed first. Knows nothing of models.
"""

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_chat.cli.batch.lines import Line, shown
from mistral_chat.cli.console.durable import sync_folder
from mistral_chat.cli.console.locks import lock
from mistral_chat.errors import OutputError, UsageError

__all__ = ["Output", "check_target", "error_record"]

_RECORD_START = b'{"id": '
_ERROR_LINE = re.compile(r"line (\d+): ")
# JSON allows these, but Python's splitlines and other readers would split a record there.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def error_record(line: Line, error: str) -> dict[str, Any]:
    """Make the record of a line with an error; the error names the line."""
    named = error if _ERROR_LINE.match(error) else f"line {line.number}: {error}"
    return {"id": line.id, "error": named}


def check_target(target: str) -> None:
    """Refuse an OUT that cannot be written, as far as can be told without creating anything.

    Raises:
        OutputError: a folder, a missing parent folder, or no permission.
    """
    if target == "-":
        if sys.stdout is None:
            raise OutputError("stdout is closed: expected somewhere to write the answers to")
        return
    path = Path(target)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        place = path if path.exists() else path.parent
        place.stat()
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _cannot_write(target, error) from error


def _cannot_write(target: str, error: OSError) -> OutputError:
    return OutputError(f"{target}: cannot be written ({error.strerror})")


class Output:
    """OUT: an open and locked file, or stdout.

    Args:
        target: its path, or `-`.
        source: stat of IN, which must be another file.

    Raises:
        OutputError: it cannot be written, or another run is writing it.
        UsageError: it is IN itself.
    """

    def __init__(self, target: str, source: os.stat_result) -> None:
        self._target = target
        self._fd: int | None = None
        if target == "-":
            if sys.stdout is None:
                raise OutputError("stdout is closed: expected somewhere to write the answers to")
            self._is_file = False
            self._refuse_source(os.fstat(sys.stdout.fileno()), source)
            return
        path = Path(target)
        try:
            is_new = not path.exists()
            kind = os.O_RDWR if is_new or path.is_file() else os.O_WRONLY
            self._fd = os.open(path, kind | os.O_CREAT | os.O_APPEND, 0o666)
            found = os.fstat(self._fd)
            self._is_file = stat.S_ISREG(found.st_mode)
            self._refuse_source(found, source)
            if self._is_file and not lock(self._fd):
                raise OutputError(
                    f"{target}: another run is writing it: wait for its end, or name another OUT"
                )
            if self._is_file and not os.path.samestat(found, path.stat()):
                raise OutputError(f"{target}: another run has just replaced it: start this again")
            if is_new and self._is_file:
                sync_folder(path.parent)
        except OSError as error:
            raise _cannot_write(target, error) from error

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _refuse_source(self, found: os.stat_result, source: os.stat_result) -> None:
        if stat.S_ISREG(found.st_mode) and os.path.samestat(found, source):
            raise UsageError(f"IN and OUT are the same file ({self._target}): expected two")

    @property
    def is_file(self) -> bool:
        """Whether a later run can continue it."""
        return self._is_file

    @property
    def _beside(self) -> Path:
        """Path of the temporary file that replaces this one."""
        path = Path(self._target).resolve()
        return path.with_name(f".{path.name}.retry_errors")

    def resume(
        self, lines: Sequence[Line], model: str, *, retry_errors: bool = False
    ) -> tuple[set[int], int]:
        """Read the records of an earlier run, and cut off an unfinished one.

        Args:
            lines: all lines of IN.
            model: the model's name in records; only its last path component is compared.
            retry_errors: whether to remove error records, so that their lines are run again.

        Returns:
            the numbers of the lines that are done, and how many of them have an error.

        Raises:
            OutputError: it has other content than answers of this model to these lines.
        """
        if self._fd is None or not self._is_file:
            return set(), 0
        by_number = {line.number: line for line in lines}
        owners = {line.id: line for line in reversed(lines)}
        done: set[int] = set()
        failed: set[int] = set()  # positions of records to remove
        n_errors = end = 0
        torn = b""
        with Path(self._target).open("rb") as file:
            for place, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    torn = text.rstrip(b"\0")  # a power cut can leave zeros at the end
                    break
                end += len(text)
                id_, error = self._read_record(text, place, model)
                if retry_errors and error is not None:
                    failed.add(place)  # its line of IN may have been corrected since
                    continue
                # A line with the id of another line is identified by the number in its error.
                named = _ERROR_LINE.match(error or "")
                line = by_number.get(int(named[1])) if named else None
                if line is None or line.id != id_:
                    line = owners.get(id_)
                if line is None or line.number in done:
                    why = "is not in IN" if line is None else "is there twice"
                    raise self._foreign(place, f"the id {shown(id_)} {why}")
                done.add(line.number)
                n_errors += error is not None
        if not (torn.startswith(_RECORD_START) or _RECORD_START.startswith(torn)):
            raise self._foreign(len(done) + len(failed) + 1, "it is no answer of ours")
        try:
            self._beside.unlink(missing_ok=True)  # left by a run that was killed
            if failed:
                self._take_out(failed)
            elif os.fstat(self._fd).st_size > end:
                os.ftruncate(self._fd, end)
                os.fsync(self._fd)
        except OSError as error:
            raise _cannot_write(self._target, error) from error
        return done, n_errors

    def _take_out(self, places: Collection[int]) -> None:
        """Remove lines by replacing the file atomically, so that a kill leaves the old or the new.

        Args:
            places: numbers of lines, from 1; an unfinished line is removed, too.

        Raises:
            OSError: it cannot be written.
        """
        assert self._fd is not None
        path, beside = Path(self._target).resolve(), self._beside
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
        new = os.open(beside, flags, 0o600)
        try:
            os.fchmod(new, stat.S_IMODE(os.fstat(self._fd).st_mode))
            lock(new)  # before it gets the name that other runs look for
            with path.open("rb") as file, os.fdopen(os.dup(new), "wb") as kept:
                for place, text in enumerate(file, 1):
                    if place not in places and text.endswith(b"\n"):
                        kept.write(text)
            os.fsync(new)
            beside.rename(path)
            sync_folder(path.parent)
        except BaseException:
            os.close(new)
            beside.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = new

    def _read_record(self, text: bytes, place: int, model: str) -> tuple[str | int, str | None]:
        try:
            value = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as fault:
            raise self._foreign(place, "it is not JSON") from fault
        id_ = value.get("id") if isinstance(value, dict) else None
        if not isinstance(id_, (str, int)) or isinstance(id_, bool):
            raise self._foreign(place, "it has no id")
        error = value.get("error")
        if not isinstance(error if "error" in value else value.get("text"), str):
            raise self._foreign(place, "it has neither text nor error")
        writer = value.get("model", model)
        if not isinstance(writer, str) or Path(writer).name != Path(model).name:
            raise self._foreign(place, f"{shown(writer)} wrote it, and MODEL is {shown(model)}")
        return id_, error

    def _foreign(self, place: int, why: str) -> OutputError:
        return OutputError(
            f"{self._target}, line {place}: {why}: expected what a run of this IN and MODEL "
            f"wrote, or an OUT that is empty or new (where IN was mended: --retry_errors)"
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record as one line; return once it is on disk.

        Raises:
            OutputError: it cannot be written, for example to a full disk.
            BrokenPipeError: the reader has gone.
        """
        text = json.dumps(record, ensure_ascii=False).translate(_LINE_ENDS) + "\n"
        if self._fd is None:
            from mistral_chat.cli.console import render

            render.say(text)
            return
        left = memoryview(text.encode())
        try:
            while left:  # usually one write; less if a disk fills up or a pipe is full
                left = left[os.write(self._fd, left) :]
            if self._is_file:
                os.fsync(self._fd)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"{self._target}: cannot be written ({error.strerror}): make room; the same "
                f"command then goes on"
            ) from error
