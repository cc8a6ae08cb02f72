"""A user's Python file: which functions it offers, and that no call can do harm."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mistral_chat.chat.function_environment import is_secret
from mistral_chat.chat.functions import MAX_CHARS, CallsCancelledError, PythonFunctions, _Worker
from mistral_chat.chat.tools import ToolCall
from mistral_chat.errors import PromptError, UsageError
from tests.conftest import ROOT, is_alive, wait_for_end

EVERY_TYPE = '''
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import Field


@dataclass
class Point:
    """A place."""

    x: float
    y: float = 0.0


class Color(Enum):
    RED = "red"
    BLUE = "blue"


def every(
    text: str, whole: int, number: float, yes: bool, nothing: None, listed: list[int],
    table: dict[str, Any], point: Point, color: Color, unit: Literal["C", "F"],
    own: Annotated[str, Field(description="said here")] = "o",
    maybe: int | None = None, more: list[str] = ["a"],
) -> Any:
    """Take every type.

    And give it back.

    Args:
        text: any text.
        own: not said.
        maybe: a number, or none.
    """
    return {name: value for name, value in locals().items()}
'''
ARGUMENTS: dict[str, Any] = {
    "text": 'é "日本" \\ \n\t🙂', "whole": -(2**40), "number": 2.5, "yes": False, "nothing": None,
    "listed": [], "table": {"a": [{"b": None}, 1.5, "x"]}, "point": {"x": 1, "y": 2.5},
    "color": "blue", "unit": "C", "own": "", "maybe": 3, "more": ["", "b"],
}  # fmt: skip
OPTIONAL = ("own", "maybe", "more")

MISDEEDS = '''
import os, signal, subprocess, sys, threading, time

def add(a: int, b: int) -> int:
    """Add."""
    return a + b

def raises() -> None:
    """Raise."""
    raise ValueError("no such place\\nat all")

def hangs() -> None:
    """Hang."""
    while True:
        pass

def sleeps(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "slept"

def prints() -> str:
    """Print."""
    print("to stdout \\x1b[31mred")
    print("to stderr", file=sys.stderr)
    os.write(1, b"no line end")
    subprocess.run(["echo", "a child's"])
    return "quiet"

def floods() -> str:
    """Print much."""
    for n in range(20_000):
        print(n, "x" * 100)
    return "done"

def exits() -> None:
    """Exit."""
    sys.exit(3)

def ends() -> None:
    """End the process."""
    os._exit(7)

def crashes() -> None:
    """Crash."""
    os.kill(os.getpid(), signal.SIGSEGV)

def ends_by_nameless_signal() -> None:
    """Crash by a signal without a name of its own."""
    os.kill(os.getpid(), signal.SIGRTMIN + 6)

def writes_anywhere() -> None:
    """Write what is no reply to all that is open."""
    for handle in range(3, 30):
        try:
            os.write(handle, b"[" * 60_000 + b"\\n")
        except OSError:
            continue

def forks() -> str:
    """Fork, and have both go on."""
    return "child" if os.fork() == 0 else "parent"

def reads() -> str:
    """Read stdin."""
    return input()

def asks_terminal() -> str:
    """Open the terminal."""
    return open("/dev/tty").read()

def closes() -> str:
    """Close what there is."""
    os.closerange(0, 100)
    return "closed"

def takes_stderr() -> None:
    """Raise where nothing can be printed."""
    sys.stderr.close()
    raise ValueError("the reason")

def gives_text_of_its_own() -> str:
    """Give a text of another class."""
    class Text(str):
        def __str__(self):
            raise ValueError
    return Text("as it is")

def gives_object() -> object:
    """Give what is no JSON."""
    return object()

def gives_deep() -> list:
    """Give what is too deep."""
    value = []
    for _ in range(5000):
        value = [value]
    return value

def gives_endless():
    """Give a loop."""
    value = {}
    value["v"] = value
    return value

def gives_half() -> str:
    """Give half a character."""
    return "a\\ud83d"

def gives_numbers() -> list:
    """Give numbers that JSON lacks."""
    return [float("nan"), 1e400]

def gives_much() -> str:
    """Give much."""
    return "é" * 100_000

def leaves_child() -> int:
    """Start a process that would outlive the call."""
    return subprocess.Popen(["sleep", "300"]).pid

def counts() -> int:
    """Count calls of this process."""
    globals()["n"] = globals().get("n", 0) + 1
    return n
'''


def write(folder: Path, text: str, name: str = "functions.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall("a" * 9, name, arguments)


class Offered:
    """Functions with a short time limit, and the lines that they printed."""

    def __init__(self, path: Path, timeout_s: float = 20.0) -> None:
        self.printed: list[str] = []
        self.functions = PythonFunctions(path, timeout_s, self.printed.append)

    def call(self, name: str, **arguments: Any) -> str:
        return self.functions.call(call(name, **arguments))


@pytest.fixture(scope="module")
def misdeeds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offered]:
    offered = Offered(write(tmp_path_factory.mktemp("functions"), MISDEEDS))
    with offered.functions:
        yield offered


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonFunctions]:
    path = write(tmp_path_factory.mktemp("functions"), EVERY_TYPE)
    with PythonFunctions(path, 20) as functions:
        yield functions


def test_schema_says_types_defaults_and_docs(every: PythonFunctions) -> None:
    (tool,) = every.tools
    assert tool.function.name == "every"
    assert tool.function.description == "Take every type.\n\nAnd give it back."
    schema = tool.function.parameters
    properties = schema["properties"]
    assert list(properties) == list(ARGUMENTS)
    assert set(schema["required"]) == set(ARGUMENTS) - set(OPTIONAL)
    assert properties["text"] == {"type": "string", "description": "any text."}
    assert properties["own"]["description"] == "said here"
    assert properties["more"]["default"] == ["a"]
    assert properties["maybe"]["default"] is None
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(ARGUMENTS, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(ARGUMENTS | {"unknown": 1}, schema)


def test_arguments_of_every_json_type_arrive_as_they_are(every: PythonFunctions) -> None:
    given = json.loads(every.call(call("every", **ARGUMENTS)))
    assert given == ARGUMENTS
    left_out = {name: value for name, value in ARGUMENTS.items() if name not in OPTIONAL}
    given = json.loads(every.call(call("every", **left_out)))
    assert given == left_out | {"own": "o", "maybe": None, "more": ["a"]}


# Nothing is converted, even if pydantic could convert it.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", 3), ("text", None), ("whole", "3"), ("whole", 2.5), ("whole", True),
        ("number", "2.5"), ("yes", "true"), ("yes", 1), ("nothing", 0), ("listed", ["1"]),
        ("listed", {}), ("table", []), ("point", {"y": 1}), ("point", {"x": 1, "z": 1}),
        ("color", "green"), ("unit", "K"), ("maybe", "none"), ("unknown", 1),
    ],
)  # fmt: skip
def test_arguments_of_another_type_are_told_to_the_model(
    every: PythonFunctions, name: str, value: Any
) -> None:
    result = every.call(call("every", **ARGUMENTS | {name: value}))
    assert result.startswith(f"error: wrong arguments: {name}")


def test_argument_that_is_missing_is_told_to_the_model(every: PythonFunctions) -> None:
    assert every.call(call("every")).startswith("error: wrong arguments: text: Field required; ")


def test_argument_may_have_a_name_that_python_has_taken(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '''
        from typing import Annotated
        from pydantic import Field
        def trains(
            from_: Annotated[str, Field(alias="from")],
            class_: Annotated[int, Field(alias="class")] = 2,
        ) -> list:
            """Trains from a place."""
            return [from_, class_]
        ''',
    )
    offered = Offered(path)
    with offered.functions as functions:
        (tool,) = functions.tools
        properties = tool.function.parameters["properties"]
        assert properties["class"] == {"type": "integer", "default": 2}
        assert tool.function.parameters["required"] == ["from"]
        assert offered.call("trains", **{"from": "Rome"}) == '["Rome",2]'
        assert offered.call("trains", **{"from": "Rome", "class": 1}) == '["Rome",1]'
        assert offered.call("trains", from_="Rome").startswith("error: wrong arguments: from: ")
    assert offered.printed == []


def test_results_are_text_or_json(misdeeds: Offered) -> None:
    assert misdeeds.call("add", a=2, b=-3) == "-1"
    assert misdeeds.call("sleeps", seconds=0) == "slept"
    assert misdeeds.call("gives_numbers") == '["NaN","Infinity"]'
    assert misdeeds.call("gives_half") == "a?"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "error: ValueError: no such place"),
        ("exits", "error: sys.exit(3) was called"),
        ("ends", "error: its Python process ended with code 7"),
        ("crashes", "error: its Python process was killed by SIGSEGV"),
        ("ends_by_nameless_signal", "error: its Python process was killed by signal 40"),
        ("writes_anywhere", "null"),
        ("reads", "error: EOFError: EOF when reading a line"),
        ("asks_terminal", "error: OSError: "),
        ("gives_text_of_its_own", "as it is"),
        ("gives_object", "error: the result, of type object, is no JSON: "),
        ("gives_deep", "error: the result, of type list, is no JSON: "),
        ("gives_endless", "error: the result, of type dict, is no JSON: "),
        ("no_such", "error: there is no function no_such"),
        ("forks", "parent"),
    ],
)
def test_misdeed_is_survived(misdeeds: Offered, name: str, said: str) -> None:
    assert misdeeds.call(name).startswith(said)
    assert misdeeds.call("add", a=1, b=1) == "2"


def test_result_that_is_long_is_cut_and_says_so(misdeeds: Offered) -> None:
    text = misdeeds.call("gives_much")
    assert text == "é" * MAX_CHARS + f"\n[cut: the first {MAX_CHARS:,} of 100,000 characters]"


def test_hanging_call_is_killed_and_the_next_one_has_a_new_process(tmp_path: Path) -> None:
    # The processes that it starts have no more time than that, either.
    offered = Offered(write(tmp_path, MISDEEDS), 4)
    with offered.functions:
        assert [offered.call("counts") for _ in range(3)] == ["1", "2", "3"]
        started = time.monotonic()
        said = "error: no result after 4 s (--tool_timeout); it was stopped"
        assert offered.call("hangs") == said
        assert 4 <= time.monotonic() - started < 120
        assert offered.call("counts") == "1"
        # One that takes stderr away can still say why it failed.
        assert offered.call("takes_stderr") == "error: ValueError: the reason"
        # One that closes its pipes can no longer answer.
        assert offered.call("closes").startswith("error: ")
        assert offered.call("counts") == "1"


def test_what_is_printed_is_shown_and_reaches_no_stdout(
    misdeeds: Offered, capfd: pytest.CaptureFixture[str]
) -> None:
    misdeeds.printed.clear()
    assert misdeeds.call("prints") == "quiet"
    assert "to stdout \ufffd[31mred" in misdeeds.printed
    assert {"to stderr", "no line enda child's"} <= set(misdeeds.printed)
    assert capfd.readouterr() == ("", "")
    misdeeds.printed.clear()
    assert misdeeds.call("floods") == "done"
    assert misdeeds.printed[0] == "0 " + "x" * 100
    assert misdeeds.printed[-1] == "… (the rest of what it prints is not shown)"
    assert len(misdeeds.printed) == 201
    misdeeds.printed.clear()
    assert misdeeds.call("raises").startswith("error")
    assert misdeeds.printed[0] == "Traceback (most recent call last):"
    assert not any("function_worker" in line for line in misdeeds.printed)


def test_what_a_call_prints_is_shown_though_it_never_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    text = """
        import os, time
        def hangs() -> None:
            'Hang.'
            print("waiting for the door")
            time.sleep(300)
        def ends() -> None:
            'End the process.'
            print("leaving")
            os._exit(1)
        """
    offered = Offered(write(tmp_path, text), 1.5)
    with offered.functions:
        assert offered.call("hangs").startswith("error: no result")
        assert offered.call("ends").startswith("error: its Python process ended")
    assert offered.printed == ["waiting for the door", "leaving"]


def test_cancelled_call_ends_at_once(misdeeds: Offered) -> None:
    started = time.monotonic()
    with pytest.raises(CallsCancelledError):
        misdeeds.functions.call(
            call("sleeps", seconds=60), lambda: time.monotonic() - started > 0.3
        )
    assert time.monotonic() - started < 120
    assert misdeeds.call("add", a=1, b=1) == "2"


def test_process_that_cannot_be_started_leaves_no_pipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tools.py"
    path.write_text(EVERY_TYPE)

    def refuse(*_words: Any, **_options: Any) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(PromptError, match="no Python process can be started"):
        PythonFunctions(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_fork_of_the_file_itself_answers_no_calls(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        import os, time
        if os.fork():
            time.sleep(0.5)
        def who() -> int:
            'Say which process this is.'
            return os.getpid()
        """,
    )
    with PythonFunctions(path, 20) as functions:
        assert functions._worker is not None
        asked = str(functions._worker._process.pid)
        assert [functions.call(call("who")) for _ in range(8)] == [asked] * 8


def test_close_ends_all_that_calls_have_started(tmp_path: Path) -> None:
    offered = Offered(write(tmp_path, MISDEEDS))
    pid = int(offered.call("leaves_child"))
    assert is_alive(pid)
    offered.functions.close()
    wait_for_end(pid)


# Nothing outlives the process that asked, however that ends.
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_functions_end_with_the_process_that_started_them(tmp_path: Path, how: int) -> None:
    path = write(
        tmp_path,
        '''
        import os, subprocess
        def hangs() -> None:
            """Hang."""
            print(os.getpid(), subprocess.Popen(["sleep", "300"]).pid, flush=True)
            while True:
                pass
        ''',
    )
    script = (
        "import sys; from pathlib import Path\n"
        "from mistral_chat.chat.functions import PythonFunctions\n"
        "from mistral_chat.chat.tools import ToolCall\n"
        "show = lambda line: print(line, flush=True)\n"
        "PythonFunctions(Path(sys.argv[1]), 60, show).call(ToolCall('a' * 9, 'hangs', {}))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        os.kill(parent.pid, how)
        parent.wait(60)
        for pid in pids:
            wait_for_end(pid)


REFUSED = [
    ("def f(a) -> None:\n    'd'", "f: the parameter a has no type"),
    ("def f(a: int, *rest: int) -> None:\n    'd'", r"f takes \*rest"),
    ("def f(**rest: int) -> None:\n    'd'", r"f takes \*\*rest"),
    ("def f(a: int, /) -> None:\n    'd'", "f takes a by its position only"),
    ("def f(a: int) -> None: ...", "f has no docstring"),
    ("class C: ...\ndef f(a: C) -> None:\n    'd'", "f: the parameter a has the type C, which"),
    ("from typing import Callable\ndef f(a: list[Callable[[], int]]) -> None:\n    'd'",
     "f: the parameter a has the type"),
    ("def f(a: 'Nowhere') -> None:\n    'd'", "f: its annotations cannot be read"),
    ("import os\ndef f(a: 'os.Nowhere') -> None:\n    'd'", "f: its annotations cannot be read"),
    ("from pydantic import Field\ndef f(a: int = Field(gt=1)) -> None:\n    'd'",
     "f: the parameter a has a Field as its default: expected Annotated"),
    ("async def f(a: int) -> None:\n    'd'", "f is async"),
    ("async def f(a: int):\n    'd'\n    yield a", "f is async"),
    ("def f(a: int):\n    'd'\n    yield a", "f is a generator"),
    ("def é(a: int) -> None:\n    'd'", "é: expected a name"),
    ("", "found no public function"),
    ("def _f() -> None:\n    'd'", "found no public function"),
    ("from os.path import join\nfrom json import dumps", "found no public function"),
    ("\n\nimport no_such_module_at_all", "cannot be imported at line 3 .ModuleNotFoundError"),
    ("\nx = 1\nraise SystemExit(2)", r"cannot be imported at line 3 .sys.exit\(2\)"),
    ("\ndef f(:\n", "line 2 is no Python"),
    ("\n\nimport beside", r"cannot be imported at line 3 .SyntaxError: .*beside.py, line 2"),
    ("import os\nos._exit(9)", "its Python process ended with code 9"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_file_that_cannot_be_offered_is_refused_by_name(
    tmp_path: Path, text: str, said: str
) -> None:
    write(tmp_path, "\ndef f(:\n", "beside.py")
    path = write(tmp_path, text)
    with pytest.raises(PromptError, match=said) as caught:
        PythonFunctions(path, 20)
    assert str(caught.value).startswith(str(path))


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="typing.TypedDict is enough there")
def test_typed_dict_that_this_python_has_no_use_for_is_refused_with_the_one_it_has(
    tmp_path: Path,
) -> None:
    text = """
        from {} import TypedDict
        class Place(TypedDict):
            city: str
        def f(place: Place) -> str:
            'd'
            return place["city"]
        """
    with pytest.raises(PromptError, match="type Place: expected a TypedDict of typing_extensions"):
        PythonFunctions(write(tmp_path, text.format("typing")), 20)
    with PythonFunctions(write(tmp_path, text.format("typing_extensions")), 20) as functions:
        assert functions.call(call("f", place={"city": "Rome"})) == "Rome"


def test_file_is_refused_with_the_last_words_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = _Worker._read_replies

    def read_and_be_late(worker: _Worker) -> Iterator[dict[str, Any]]:
        yield from list(read(worker))
        worker._process.wait()

    monkeypatch.setattr(_Worker, "_read_replies", read_and_be_late)
    with pytest.raises(PromptError, match="found no public function"):
        PythonFunctions(write(tmp_path, ""), 20)


def test_file_that_is_missing_or_hangs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"missing.py: no such file"):
        PythonFunctions(tmp_path / "missing.py")
    path = write(tmp_path, "while True: pass")
    with pytest.raises(PromptError, match="no result after 1 s"):
        PythonFunctions(path, 1)


def test_only_functions_of_the_file_itself_are_offered(tmp_path: Path) -> None:
    write(tmp_path, "def other() -> int:\n    'd'\n    return 5", "beside.py")
    path = write(
        tmp_path,
        '''
        from functools import lru_cache, wraps
        from json import dumps
        from beside import other

        def logged(function):
            @wraps(function)
            def wrapper(*args, **kwargs):
                return function(*args, **kwargs)
            return wrapper

        _logged = logged
        del logged  # public, and without types

        @_logged
        def wrapped(a: int) -> int:
            """Wrapped."""
            return a + other()

        @lru_cache
        def cached(a: int) -> int:
            """Cached."""
            return a

        again = wrapped

        def _private() -> None: ...

        class Thing:
            def method(self) -> None: ...
        ''',
    )
    with PythonFunctions(path, 20) as functions:
        assert [tool.function.name for tool in functions.tools] == ["wrapped", "cached"]
        assert functions.call(call("wrapped", a=2)) == "7"
        assert functions.call(call("cached", a=2)) == "2"


def test_file_that_changes_is_read_again_by_the_next_process(tmp_path: Path) -> None:
    path = write(tmp_path, MISDEEDS)
    with PythonFunctions(path, 20) as functions:
        write(tmp_path, "def add(:")
        assert functions.call(call("add", a=1, b=1)) == "2"
        assert functions.call(call("ends")).startswith("error")
        assert (
            functions.call(call("add", a=1, b=1)) == "error: line 1 is no Python (invalid syntax)"
        )
        write(tmp_path, "def add(a: int, b: int) -> int:\n    'd'\n    return a - b")
        assert functions.call(call("add", a=1, b=1)) == "0"


SECRETS = ("HF_TOKEN", "OPENAI_API_KEY", "MISTRAL_API_KEY", "GITHUB_TOKEN", "CLIENT_SECRET",
           "SECRET_KEY_BASE", "PGPASSWORD", "DB_PASSWORD_FILE", "AWS_PROFILE", "npm_config_token",
           "GOOGLE_APPLICATION_CREDENTIALS", "MISTRAL_CHAT_API_KEY", "MISTRAL_CHAT_LIFELINE",
           "DB_PASS", "HUGGING_FACE_HUB_TOKEN", "APIKEY")  # fmt: skip
HARMLESS = ("PATH", "HOME", "LANG", "TOKENIZERS_PARALLELISM", "PYTHONPATH", "KEYBOARD", "BYPASS",
            "http_proxy", "MONKEY_ISLAND", "HF_HOME", "COMPASS_DIR")  # fmt: skip

ENVIRONMENT = '''
import os

def seen() -> list[str]:
    """Names of variables."""
    return list(os.environ)

def needs() -> str:
    """A value of the environment."""
    return os.environ["WEATHER_API_KEY"]
'''


@pytest.mark.parametrize("name", [*SECRETS, *HARMLESS])
def test_secrets_are_known_by_their_names(name: str) -> None:
    assert is_secret(name) == (name in SECRETS)


def test_functions_see_the_environment_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*SECRETS, *HARMLESS, "WEATHER_API_KEY"):
        if name not in os.environ:
            monkeypatch.setenv(name, "x")
    path, printed = write(tmp_path, ENVIRONMENT), []
    with PythonFunctions(path, 60, printed.append, ["HF_TOKEN"]) as functions:
        seen = set(json.loads(functions.call(ToolCall("a" * 9, "seen", {}))))
        said = functions.call(ToolCall("a" * 9, "needs", {}))
    assert seen >= {*HARMLESS, "HF_TOKEN"}
    assert seen.isdisjoint({*SECRETS, "WEATHER_API_KEY"} - {"HF_TOKEN"})
    # The model is told what happened, the user what to do about it.
    hint = "WEATHER_API_KEY is withheld from functions: --tools_env WEATHER_API_KEY hands it on"
    assert said == "error: KeyError: 'WEATHER_API_KEY'"
    assert printed[-1] == hint
    with pytest.raises(PromptError, match=f"; {hint}$"):
        PythonFunctions(write(tmp_path, ENVIRONMENT + "needs()"), 60)


def test_variable_that_is_asked_for_and_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tools_env NO_SUCH_NAME: there is no such variable"):
        PythonFunctions(write(tmp_path, ENVIRONMENT), 60, variables=["NO_SUCH_NAME"])
