"""A process that has imported everything and forks for each command: two seconds less for each.

`warm()` starts it and is asked for commands; `python -m tests.warm FD [MODULE...]` is the process
itself, with one end of a socket. A command is a process of its own as ever, and only its imports
are shared. The ranks that it starts are forked, too, and are its children all the same. What is
tested of a process's very beginning needs a fresh one, as does what libraries read from the
environment while they are imported.
"""

import atexit
import contextlib
import ctypes
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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import pexpect
import ptyprocess

ROOT = Path(__file__).parent.parent
PLAIN_SCRIPTS = ("mistral_chat.__main__", "mistral_chat.chat.function_worker")
OF_TORCHRUN = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
STARTS_RANKS = ("tests.scripts.llms", "demo")  # and what is given a number of them
OF_RANKS = ("mistral_chat", "tests.scripts.scripted")  # what torchrun is asked for
MOST_REQUEST_BYTES = 1 << 17
WAIT_S = 60
_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


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
        request = {"module": module, "words": list(words), "env": dict(env)}
        session = "terminal" if takes_terminal else "new"
        return Command(_ask(self._socket, request | {"session": session}, streams))

    def fork_rank(self, request: dict[str, Any], streams: Sequence[int]) -> int:
        """Fork a rank whose parent is this process; its process id."""
        return _fork_rank(self._socket, request, streams)

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


def _ask(asked: socket.socket, request: dict[str, Any], streams: Sequence[int]) -> socket.socket:
    """Have a process forked; the socket on which is said what becomes of it."""
    says, theirs = socket.socketpair()
    with theirs:
        data = json.dumps(request).encode(errors="surrogateescape")
        socket.send_fds(asked, [data], [*streams, theirs.fileno()])
    return says


def _fork_rank(asked: socket.socket, request: dict[str, Any], streams: Sequence[int]) -> int:
    """Have a descendant of this process fork a rank, and adopt it as an orphan; its process id."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        with _ask(asked, request | {"parent": os.getpid()}, streams) as says:
            says.settimeout(WAIT_S)
            pid = int(says.recv(32))
            while says.recv(1):  # until it is ours
                pass
        return pid
    finally:
        prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class ForkedRank:
    """A rank that was forked, and is a child of this process: what `subprocess.Popen` would be."""

    def __init__(self, pid: int, args: Sequence[str]) -> None:
        self.pid, self.args = pid, args
        self.stdout = self.stderr = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The code that it ended with, None while it goes on."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended; its code."""
        deadline = time.monotonic() + (WAIT_S * 10 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(self.args), timeout or WAIT_S * 10)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal where it goes on."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)


def fork_ranks(fork_rank: Callable[[dict[str, Any], Sequence[int]], int]) -> None:
    """From now on, fork the ranks that our launchers, or torchrun, start in this process.

    Args:
        fork_rank: is given the request and the streams, and gives the process id.
    """
    from mistral_chat.engine import rank

    def words_of(args: Sequence[str]) -> list[str] | None:
        """The module or file that Python is to run, and its words; None where it is no rank."""
        match list(args):
            case [sys.executable, "-P", rank.__file__, *words]:
                return [rank.__file__, *words]
            case [sys.executable, "-u", "mistral-chat", *words]:  # torchrun's
                return ["mistral-chat", *words]
            case [sys.executable, "-u", "-m", module, *words] if module in OF_RANKS:
                return [module, *words]
        return None

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __new__(cls, args: Any = "", **options: Any) -> Self:
            words = words_of(args) if not isinstance(args, str) else None
            if words is None:
                return super().__new__(cls)
            session = "new" if options.get("start_new_session") else "same"
            if options.get("process_group") is not None:
                session = "group"
            request = {"module": words[0], "words": words[1:], "env": dict(options["env"])}
            ignores_interrupts = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            request |= {"session": session, "ignores_interrupts": ignores_interrupts}
            with open(os.devnull) as nothing:  # noqa: PTH123
                no_stdin = options.get("stdin") == subprocess.DEVNULL
                streams = [nothing.fileno() if no_stdin else 0, 1, 2]
                return ForkedRank(fork_rank(request, streams), args)  # type: ignore[return-value]

    subprocess.Popen = Popen  # type: ignore[misc]
    if torchrun := sys.modules.get(OF_TORCHRUN):
        torchrun.Popen = Popen  # type: ignore[attr-defined]


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
    if node_memory := sys.modules.get("mistral_chat.engine.ranks.node_memory"):
        node_memory.SPINS = 20  # type: ignore[attr-defined]  # ranks of tests share their cores
    gc.freeze()  # or each command would look at all of this again, and have its pages copied


def _serve(requests: socket.socket) -> dict[str, Any]:
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
        request: dict[str, Any] = json.loads(data.decode(errors="surrogateescape"))
        *streams, says = handles
        forked_by = os.getpid()
        if pid := os.fork():
            for handle in streams:
                os.close(handle)
            os.write(says, f"{pid:<32}".encode())
            if "parent" in request:
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            os.write(says, str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        if "parent" in request:
            while os.getppid() == forked_by:
                time.sleep(0.0005)
        os.close(says)
        for number, handle in enumerate(streams):
            os.dup2(handle, number)
            os.close(handle)
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


def _fork_its_ranks() -> dict[str, Any] | None:
    """Fork a process that forks this command's ranks; in a rank, the request."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        fork_ranks(functools.partial(_fork_rank, ours))
        return None
    ours.close()
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's are for the command
        signal.signal(number, signal.SIG_IGN)
    with open(os.devnull, "r+") as nothing:  # noqa: PTH123
        for number in range(3):
            os.dup2(nothing.fileno(), number)
    request = _serve(theirs)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    ignores = request["ignores_interrupts"]
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignores else signal.default_int_handler)
    return request


def become(request: dict[str, Any]) -> NoReturn:
    """Run what was asked for as this process's only job, as a process that was just forked."""
    module, words, session = request["module"], request["words"], request["session"]
    if session in ("new", "terminal"):
        os.setsid()
    elif session == "group":
        os.setpgid(0, 0)
    if session == "terminal":
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    starts_ranks = any(word in STARTS_RANKS or "nproc" in word for word in (module, *words))
    if starts_ranks and module != "tests.scripts.shell" and (request_of_rank := _fork_its_ranks()):
        become(request_of_rank)
    _open_streams()
    if _of_hub(request["env"]) != _of_hub(os.environ):  # which it reads while it is imported
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None  # its environment may have another one
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # as at Python's start
        if (script := Path(folder, "sitecustomize.py")).is_file():
            runpy.run_path(str(script))
    sys.argv = [module, *words]
    sys.orig_argv = [sys.executable, *([] if Path(module).is_file() else ["-m"]), *sys.argv]
    try:
        if module == "-c":
            exec(words[0], {"__name__": "__main__"})
        elif Path(module).is_file():
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        _end(end.code)
    except Exception:
        sys.excepthook(*sys.exc_info())
        _end(1)
    _end(0)


def _of_hub(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("HF_")}


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
    become(_serve(socket.socket(fileno=int(sys.argv[1]))))
