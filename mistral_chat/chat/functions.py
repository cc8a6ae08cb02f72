"""Run the functions of a user's Python file in a separate process with a time limit.

Only `function_worker.py` imports the file, so no function can take this process down. Knows
nothing of who requests a call or where its result goes.
"""

import codecs
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mistral_common.protocol.instruct.tool_calls import Tool

from mistral_chat.chat.function_environment import split_environment
from mistral_chat.chat.tools import ToolCall, make_tool
from mistral_chat.errors import PromptError

__all__ = ["CallsCancelledError", "PythonFunctions"]

MAX_CHARS = 20_000  # of a result: about 5,000 tokens
MAX_PRINTED_LINES = 200  # of one call
POLL_S = 0.05
TIMEOUT_S = 60.0  # of one call
WORKER = Path(__file__).with_name("function_worker.py")


class CallsCancelledError(Exception):
    """The user stopped a call, or did not answer the question about it."""


class _EndedError(Exception):
    """The process has ended; the message says why."""


class PythonFunctions:
    """The functions of a file, described and ready to call; a context manager.

    Args:
        path: the Python file.
        timeout_s: time limit of one call, and of importing the file.
        on_printed: called with each line that the file prints.
        variables: environment variables to pass on even if they look secret.

    Raises:
        PromptError: the file cannot be imported, or one of its functions cannot be offered.
        UsageError: a variable does not exist.
    """

    def __init__(
        self,
        path: Path,
        timeout_s: float = TIMEOUT_S,
        on_printed: Callable[[str], None] = lambda line: None,
        variables: Sequence[str] = (),
    ) -> None:
        self._path = path
        self._environment, self._withheld = split_environment(variables)
        self._timeout_s = timeout_s
        self._on_printed = on_printed
        if not path.is_file():
            raise PromptError(f"{path}: no such file: expected a Python file of functions")
        self._worker: _Worker | None = None
        try:
            entries = self._start(lambda: False)
        except _EndedError as error:
            raise PromptError(f"{path}: {error}{self._hint(str(error))}") from error
        self.tools: list[Tool] = [make_tool(entry, str(path)) for entry in entries]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a later call starts a new one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def call(self, call: ToolCall, is_cancelled: Callable[[], bool] = lambda: False) -> str:
        """Call a function and wait for its result.

        Args:
            call: the call; its arguments are checked against the function's types.
            is_cancelled: polled about 20 times a second.

        Returns:
            the result: text unchanged, anything else as JSON; or `error: ` and the reason.

        Raises:
            CallsCancelledError: the call was cancelled before it ended.
        """
        try:
            if self._worker is None:
                self._start(is_cancelled)
            assert self._worker is not None
            reply = self._worker.ask(
                {"name": call.name, "arguments": json.dumps(call.arguments)},
                self._timeout_s,
                is_cancelled,
            )
        except _EndedError as error:
            self.close()
            return f"error: {error}"
        except CallsCancelledError:
            self.close()
            raise
        text, n_chars = str(reply["text"]), int(reply["n_chars"])
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be encoded
        if n_chars > len(text):
            text += f"\n[cut: the first {len(text):,} of {n_chars:,} characters]"
        if not reply["ok"] and (hint := self._hint(text)):
            self._on_printed(hint.removeprefix("; "))
        return text if reply["ok"] else f"error: {text}"

    def _hint(self, fault: str) -> str:
        """Return the hint to show if an error names a withheld variable."""
        for name in self._withheld:
            if re.search(rf"\b{re.escape(name)}\b", fault):
                return f"; {name} is withheld from functions: --tools_env {name} hands it on"
        return ""

    def _start(self, is_cancelled: Callable[[], bool]) -> list[Any]:
        try:
            self._worker = _Worker(self._path, self._on_printed, self._environment)
        except OSError as error:
            raise _EndedError(f"no Python process can be started ({error.strerror})") from error
        try:
            reply = self._worker.ask(None, self._timeout_s, is_cancelled)
            if "refused" in reply:
                raise _EndedError(str(reply["refused"]))
        except (_EndedError, CallsCancelledError):
            self.close()
            raise
        return list(reply["tools"])


class _Worker:
    """One process and its pipes; answers one request at a time.

    Args:
        path: the Python file.
        on_printed: called with each line that it prints.
        environment: its environment variables.
    """

    def __init__(
        self, path: Path, on_printed: Callable[[str], None], environment: dict[str, str]
    ) -> None:
        self._printed = _Lines(on_printed)
        self._n_asked = -1
        self._held = b""
        asked, self._requests = os.pipe()
        self._replies, said = os.pipe()
        held, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER), str(path.resolve()), str(asked), str(said),
                 str(held), str(MAX_CHARS)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(asked, said, held),
                start_new_session=True,  # no terminal or Ctrl-C; one group to kill
            )  # fmt: skip
        except OSError:
            self._close_pipes()
            raise
        finally:
            for handle in (asked, said, held):
                os.close(handle)
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        for handle in (self._requests, self._replies, self._out):
            os.set_blocking(handle, False)

    def ask(
        self, request: dict[str, Any] | None, timeout_s: float, is_cancelled: Callable[[], bool]
    ) -> dict[str, Any]:
        """Send a request and wait for the reply; None waits for the list of functions.

        Raises:
            _EndedError: no reply in time, or the process ended.
            CallsCancelledError: `is_cancelled` returned True.
        """
        self._n_asked += 1
        self._printed.begin()
        left = b""
        if request is not None:
            left = json.dumps({"n": self._n_asked, **request}).encode() + b"\n"
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                has_ended = self._process.poll() is not None  # before the last output is read
                left = self._write(left)
                for reply in self._read_replies():
                    if reply.get("n") == self._n_asked:
                        return reply
                self._show_printed()
                if has_ended:
                    raise _EndedError(self._why_ended())
                if is_cancelled():
                    raise CallsCancelledError
                if time.monotonic() > deadline:
                    raise _EndedError(
                        f"no result after {timeout_s:g} s (--tool_timeout); it was stopped"
                    )
                self._wait(bool(left))
        finally:
            self._show_printed()
            self._printed.end()

    def kill(self) -> None:
        """Kill the process and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._close_pipes()

    def _close_pipes(self) -> None:
        for handle in (self._requests, self._replies, self._lifeline):
            os.close(handle)

    def _wait(self, writes: bool) -> None:
        """Wait until a pipe is ready, at most POLL_S."""
        poller = select.poll()
        for handle in (self._replies, self._out):
            poller.register(handle, select.POLLIN)
        if writes:
            poller.register(self._requests, select.POLLOUT)
        events = poller.poll(POLL_S * 1000)
        if any(event & select.POLLHUP and not event & select.POLLIN for _, event in events):
            time.sleep(POLL_S / 5)  # poll returns at once for a closed pipe

    def _write(self, data: bytes) -> bytes:
        """Write as much as the pipe takes; return the rest."""
        try:
            return data[os.write(self._requests, data) :] if data else data
        except BlockingIOError:
            return data
        except BrokenPipeError:
            return b""  # the process has ended; the loop notices that

    def _read_replies(self) -> Iterator[dict[str, Any]]:
        self._held += _read(self._replies)
        *lines, self._held = self._held.split(b"\n")
        for line in lines:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):  # the file itself wrote to the pipe
                continue
            if isinstance(value, dict):
                yield value

    def _show_printed(self) -> None:
        self._printed.add(_read(self._out))

    def _why_ended(self) -> str:
        code = self._process.returncode
        if code < 0:
            named = [known.name for known in signal.Signals if known == -code]
            return f"its Python process was killed by {named[0] if named else f'signal {-code}'}"
        return f"its Python process ended with code {code}"


class _Lines:
    """Split output into lines that are safe to show, up to a limit per call."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._n_shown = 0

    def begin(self) -> None:
        self._n_shown = 0

    def add(self, data: bytes) -> None:
        self._held += self._decoder.decode(data)
        *lines, self._held = self._held.split("\n")
        for line in lines:
            self._show_line(line)
        self._held = self._held[: 2 * MAX_CHARS]  # a line that never ends

    def end(self) -> None:
        if self._held:
            self._show_line(self._held)
            self._held = ""

    def _show_line(self, line: str) -> None:
        self._n_shown += 1
        if self._n_shown <= MAX_PRINTED_LINES:
            line = line.rstrip("\r").expandtabs()[:1000]
            self._show("".join(c if c.isprintable() else "\ufffd" for c in line))
        elif self._n_shown == MAX_PRINTED_LINES + 1:
            self._show("… (the rest of what it prints is not shown)")


def _read(handle: int) -> bytes:
    """Read what the pipe holds now, at most about a megabyte."""
    data = b""
    while len(data) < 1 << 20:
        try:
            part = os.read(handle, 1 << 16)
        except BlockingIOError:
            break
        if not part:
            break
        data += part
    return data
