"""A process that has imported everything and forks for each command: two seconds less for each.

`warm()` starts it and is asked for commands; `python -m tests.warm FD [MODULE...]` is the process
itself, with one end of a socket. A command is a process of its own as ever, and only its imports
are shared. What is tested of a process's very beginning needs a fresh one, as does what libraries
read from the environment while they are imported.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pexpect
import ptyprocess

ROOT = Path(__file__).parent.parent
PLAIN_SCRIPTS = ("mistral_chat.__main__", "mistral_chat.chat.function_worker")
MOST_REQUEST_BYTES = 1 << 17
WAIT_S = 60


class Command:
    """A command that was forked, and the end of it.

    Args:
        says: a socket on which its parent says its process, and then its code.
    """

    def __init__(self, says: socket.socket) -> None:
        self._says = says
        self._code: int | None = None
        says.settimeout(WAIT_S)
        self.pid = int(says.recv(32))

    def wait(self, timeout_s: float | None) -> int:
        """The code that it ended with, negative for a signal.

        Raises:
            TimeoutError: it goes on.
        """
        if self._code is None:
            self._says.settimeout(timeout_s)
            try:
                self._code = int(self._says.recv(32))
            except BlockingIOError as error:  # a timeout of 0
                raise TimeoutError from error
            self._says.close()
        return self._code

    def is_alive(self) -> bool:
        """Whether it goes on."""
        try:
            self.wait(0)
        except TimeoutError:
            return True
        return False

    def kill(self) -> None:
        """End it where it goes on."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)
            self.wait(WAIT_S)


class Piped:
    """A command that goes on, whose stdout and stderr are pipes; it ends with the block.

    Args:
        module: with a `__main__`.
        words: of the command line.
    """

    def __init__(self, module: str, words: Sequence[str]) -> None:
        from tests.conftest import command_env

        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        with open(os.devnull) as nothing:  # noqa: PTH123
            streams = [nothing.fileno(), out_end, err_end]
            self._command = warm().start(module, words, command_env(), streams)
        for end in (out_end, err_end):
            os.close(end)
        self.pid = self._command.pid
        self.stdout, self.stderr = os.fdopen(out, "rb"), os.fdopen(err, "rb")

    def finish(self) -> tuple[int, bytes, bytes]:
        """Wait for its end: its code and what it wrote that was not read before."""
        out = b"" if self.stdout.closed else self.stdout.read()
        err = self.stderr.read()  # ends when the last process that holds it has ended
        return self._command.wait(WAIT_S), out, err

    def kill(self) -> None:
        """End it where it goes on."""
        self._command.kill()

    def __enter__(self) -> "Piped":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.stdout.close()
        self.stderr.close()


class OnTerminal(ptyprocess.PtyProcess):
    """A command in a window, whose parent is not this process."""

    command: Command

    def isalive(self) -> bool:
        """As its parent says."""
        return not self.terminated and self._has_ended(0) is False

    def wait(self) -> int | None:
        """Until it has ended; its code."""
        if not self.terminated:
            self._has_ended(None)
        return self.exitstatus  # type: ignore[no-any-return]

    def _has_ended(self, timeout_s: float | None) -> bool:
        try:
            code = self.command.wait(timeout_s)
        except TimeoutError:
            return False
        self.terminated = True
        self.exitstatus, self.signalstatus = (code, None) if code >= 0 else (None, -code)
        self.status = code << 8 if code >= 0 else -code
        return True


class Spawned(pexpect.spawn):  # type: ignore[type-arg]
    """`pexpect.spawn` of Python, `-m MODULE WORDS`, forked by `Warm`."""

    def _spawnpty(self, args: Sequence[Any], **options: Any) -> OnTerminal:
        _, _, module, *words = (os.fsdecode(arg) for arg in args)
        ours, theirs = os.openpty()
        rows, columns = options.get("dimensions") or (24, 80)
        termios.tcsetwinsize(theirs, (rows, columns))
        command = warm().start(
            module, words, options["env"], [theirs] * 3, takes_terminal=True
        )  # fmt: skip
        os.close(theirs)
        child = OnTerminal(command.pid, ours)
        child.command = command
        return child


class Warm:
    """The process that forks.

    Args:
        env: of it; commands should have what libraries read while they are imported.
        modules: all that it imports; of none, everything.
    """

    def __init__(self, env: Mapping[str, str], modules: Sequence[str] = ()) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno()), *modules],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, cwd=ROOT, env=env,
            )  # fmt: skip

    def start(
        self,
        module: str,
        words: Sequence[str],
        env: Mapping[str, str],
        streams: Sequence[int],
        *,
        takes_terminal: bool = False,
    ) -> Command:
        """Fork a command that runs a module as `python -m` would.

        Args:
            module: with a `__main__`.
            words: of the command line.
            env: all of the command's environment.
            streams: for its stdin, stdout and stderr.
            takes_terminal: its stdin is a terminal, which becomes its own.
        """
        says, theirs = socket.socketpair()
        with theirs:
            request = [module, list(words), dict(env), takes_terminal]
            data = json.dumps(request).encode(errors="surrogateescape")
            socket.send_fds(self._socket, [data], [*streams, theirs.fileno()])
        return Command(says)

    def run(
        self,
        module: str,
        words: Sequence[str],
        env: Mapping[str, str],
        data: bytes,
        timeout_s: float,
    ) -> tuple[int, bytes, bytes]:
        """Run a module; its code and what it wrote.

        Args:
            module: with a `__main__`.
            words: of the command line.
            env: all of it.
            data: to its stdin, a pipe.
            timeout_s: after which it is killed.

        Raises:
            subprocess.TimeoutExpired: it had to be.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            reader, writer = os.pipe()
            streams = [reader, out.fileno(), err.fileno()]
            command = self.start(module, words, env, streams)
            os.close(reader)
            with contextlib.suppress(BrokenPipeError), open(writer, "wb") as stdin:  # noqa: PTH123
                stdin.write(data)
            try:
                code = command.wait(timeout_s)
            except TimeoutError as error:
                command.kill()
                raise subprocess.TimeoutExpired(list(words), timeout_s) from error
            out.seek(0)
            err.seek(0)
            return code, out.read(), err.read()

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.wait(WAIT_S)


@functools.cache
def warm() -> Warm:
    """The one of this process of tests."""
    from tests.conftest import command_env

    made = Warm(command_env())
    atexit.register(made.close)
    return made


def _everything() -> list[str]:
    import mistral_chat

    modules = pkgutil.walk_packages(mistral_chat.__path__, "mistral_chat.")
    ours = [module.name for module in modules if module.name not in PLAIN_SCRIPTS]
    return [*ours, "torch.distributed.launcher.api"]  # most of what torchrun imports


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # or each command would look at all of this again, and have its pages copied


def _serve(requests: socket.socket) -> list[Any]:
    """Fork for each request until there are no more; in a forked command, the request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who waits for a command
    while True:
        data, handles, _, _ = socket.recv_fds(requests, MOST_REQUEST_BYTES, 4)
        if not data:
            os._exit(0)
        if os.fork():
            for handle in handles:
                os.close(handle)
            continue
        requests.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        *streams, says = handles
        if pid := os.fork():
            for handle in streams:
                os.close(handle)
            os.write(says, f"{pid:<32}".encode())
            _, status = os.waitpid(pid, 0)
            os.write(says, str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        os.close(says)
        for number, handle in enumerate(streams):
            os.dup2(handle, number)
            os.close(handle)
        request: list[Any] = json.loads(data.decode(errors="surrogateescape"))
        return request


def _open_streams() -> None:
    """Make Python's own streams as it does at its start: some of what they are is asked once."""
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(  # type: ignore[assignment,misc]
        io.BufferedReader(io.FileIO(0, closefd=False)),
        encoding=sys.stdin.encoding,
        errors=sys.stdin.errors,
    )
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        stream = io.TextIOWrapper(
            io.BufferedWriter(io.FileIO(number, "w", closefd=False)),
            encoding=before.encoding,
            errors=before.errors,
            line_buffering=number == 2 or os.isatty(number),
            write_through=before.write_through,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _become(module: str, words: Sequence[str], env: dict[str, str], takes_terminal: bool) -> None:
    """Run a module as this process's only job."""
    os.setsid()
    if takes_terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    _open_streams()
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *words]
    sys.orig_argv = [sys.executable, "-m", module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        _end(end.code)
    except Exception:
        sys.excepthook(*sys.exc_info())
        _end(1)
    _end(0)


def _end(code: Any) -> NoReturn:
    """End as Python does, but leave out taking all modules apart: most of a short command's time.

    What the command made itself is collected, so that a file left open is still reported.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except (OSError, ValueError):
            code = 120  # Python's own for this
    os._exit(code or 0)


if __name__ == "__main__":
    _import(sys.argv[2:] or _everything())
    _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))
