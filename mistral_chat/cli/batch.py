"""`mistral-chat batch`: a file of prompts in, a file of answers out, several at once, resumable.

OUT is its own journal: every line is written whole and synced when its answer ends, and a run that
finds it goes on with the lines of IN that it lacks. Rank 0 alone knows the files.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mistral_chat.chat.batch import Question
from mistral_chat.cli import flags
from mistral_chat.config import SamplingParams
from mistral_chat.errors import MistralChatError, OutputError, PromptError, UsageError

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.tool_calls import Tool

    from mistral_chat.chat.chat import Answer
    from mistral_chat.engine.group import Group

__all__ = ["Line", "read_lines", "run"]

FAILED = 1
AT_ONCE = {"cuda": 8, "cpu": 4}
SHOW_EVERY_S = 0.2
SETTLE_S = 0.1
HELP = """usage: mistral-chat batch MODEL IN.jsonl OUT.jsonl [flags]

Answer every line of IN, several at once, and write each answer to OUT as it ends: the object of
--json, with its id before it. The same command again goes on where it was: nothing is lost or
answered twice. - is stdin or stdout (which holds nothing to go on from).

A line of IN is an object with
  prompt               a text: one message with --instruct, else to be completed
  messages             or a conversation, in the chat template: [{"role": ..., "content": ...}]
  id                   what to call it (its line's number from 1)
  tools                function schemas, in place of --tools
  max_tokens temperature top_p top_k min_p seed stop logprobs    in place of the flags'
or a line of OpenAI's batch files: custom_id, method, url, body (a prompt there is completed).
A line that cannot be answered becomes {"id": ..., "error": "line N: ..."}; the rest goes on.

  --max_batch_size N   sequences that decode together (8 on GPUs, 4 on CPU)
  and of the main job: --instruct --system --system_file --tools --max_tokens --temperature --top_p
  --top_k --min_p --seed --stop --logprobs --quiet --nproc_per_node --device --dtype --max_seq_len
  --config --load_format

Codes: 0 all answered, 1 failed or a line has an error, 2 wrong usage, 130 interrupted.
"""
_OWN = {"max_batch_size": True, "help": False}
_SHARED = {"instruct": False, "quiet": False} | dict.fromkeys(
    ("system", "system_file", "tools", "max_tokens", "temperature", "top_p", "top_k", "min_p",
     "seed", "stop", "logprobs", "nproc_per_node", "device", "dtype", "max_seq_len", "config",
     "load_format"),
    True,
)  # fmt: skip

_WHOLE = ("max_tokens", "top_k", "seed", "logprobs")
_NUMBERS = ("temperature", "top_p", "min_p")
_SAMPLING = (*_WHOLE, *_NUMBERS, "stop")
_FIELDS = ("id", "prompt", "messages", "tools", *_SAMPLING)
_OPENAI_FIELDS = ("custom_id", "method", "url", "body")
_CHAT_URL, _COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
# What OpenAI's bodies may hold and has no meaning here; and what only one value of has.
_IGNORED = ("model", "user", "metadata", "store", "service_tier")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
}
_BODY_FIELDS = ("prompt", "messages", "tools", *_SAMPLING, "max_completion_tokens", "top_logprobs",
                *_IGNORED, *_NEUTRAL)  # fmt: skip

_RECORD_START = b'{"id": '
_ERROR_LINE = re.compile(r"line (\d+): ")
# JSON lets them be; Python's splitlines and other readers of lines would divide a record there.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of IN.

    Args:
        number: from 1.
        id: what its output is called.
        question: what it asks.
        error: or why it cannot be read.
    """

    number: int
    id: str | int
    question: Question | None = None
    error: str | None = None


class _LineError(Exception):
    """What is wrong with a line of IN."""


def run(words: Sequence[str], started: float) -> int:
    """Run the command on this rank; the code to end with."""
    from mistral_chat.engine.launch import launched_rank, launched_ranks_here, start_torchrun

    normalized = flags.normalize(words, _OWN | _SHARED)
    rank = launched_rank()
    if flags.wants_help(normalized):
        if not rank:
            print(HELP, end="")
        return 0
    options, at_once, source, target = _read_words(normalized)
    if rank is None:
        from mistral_chat.cli.main import ranks_to_start

        n_ranks = ranks_to_start(options)
        if n_ranks > 1:
            return start_torchrun(n_ranks, ["batch", *words])
    elif options.nproc_per_node not in (None, launched_ranks_here()):
        raise UsageError(
            f"--nproc_per_node is {options.nproc_per_node}, but torchrun started "
            f"{launched_ranks_here()} ranks on this node: leave the flag out"
        )
    if rank:
        return _follow(options)
    return _lead(options, at_once, source, target, started)


def _read_words(words: Sequence[str]) -> tuple[flags.Options, int | None, str, str]:
    """Options of the main job, sequences at once if given, IN and OUT."""
    cut = words.index("--") if "--" in words else len(words)
    places = [*(w for w in words[:cut] if not w.startswith("--")), *words[cut + 1 :]]
    given = [word for word in words[:cut] if word.startswith("--")]
    # Weights at random need no folder, but then the shape comes from --config.
    has_shape = any(word.startswith("--config=") for word in given)
    if len(places) != 3 and not (len(places) == 2 and has_shape):
        found = " ".join(map(repr, places)) or "nothing"
        raise UsageError(f"found {found}: expected MODEL IN.jsonl OUT.jsonl")
    *model, source, target = places
    at_once = None
    for word in given:
        name, _, value = word.partition("=")
        if name == "--max_batch_size":
            if not (value.isascii() and value.isdigit() and int(value)):
                raise UsageError(f"{name} is {value!r}: expected a whole number of at least 1")
            at_once = int(value)
    rest = [word for word in given if not word.startswith("--max_batch_size=")]
    return flags.parse(["--json", *rest, "--", *model]), at_once, source, target


def _follow(options: flags.Options) -> int:
    """Any rank but 0: hear whether there is anything to do, then serve."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once and without a word
    from mistral_chat.cli import main
    from mistral_chat.engine.launch import current_group

    group = current_group()
    try:
        n_slots = group.share(None)
    except RuntimeError:  # gloo: rank 0 has ended, and has said why
        return FAILED
    if not n_slots:
        _close_idle(group)
        return 0
    engine = replace(options.engine, max_batch_size=n_slots)
    return main._follow(replace(options, engine=engine))


def _lead(
    options: flags.Options, at_once: int | None, source: str, target: str, started: float
) -> int:
    """Rank 0: read IN and OUT, load if anything is left to do, answer."""
    from mistral_chat.cli import one_shot

    system = options.system
    if options.system_file is not None:
        system = one_shot.read_text_file(options.system_file)
    for name, text in (("system", system), *(("stop", stop) for stop in options.sampling.stop)):
        if text and _is_torn(text):
            raise PromptError(f"--{name} is not UTF-8 text: expected UTF-8 on the command line")
    data, source_stat = _read_source(source)
    lines = read_lines(data, options, system)
    if not lines:
        raise PromptError(f"{source}: nothing to answer: expected a JSON object on every line")
    tools: list[Tool] = []
    if options.tools is not None:
        from mistral_chat.chat.tools import read_tools

        tools = read_tools(options.tools)
    with _Output(target, source_stat) as output:
        done, n_errors = output.resume(lines)
        progress = _Progress(len(lines), len(done), n_errors, quiet=options.quiet)
        _end_on_signals(progress)
        todo = []
        for line in lines:
            if line.number in done:
                continue
            if line.question is not None:
                todo.append(line)
                continue
            output.write(_error_record(line, line.error or ""))
            progress.count(failed=True)
        _answer(options, at_once, todo, tools, output, progress, started)
    return progress.finish()


def _answer(
    options: flags.Options,
    at_once: int | None,
    lines: Sequence[Line],
    tools: Sequence["Tool"],
    output: "_Output",
    progress: "_Progress",
    started: float,
) -> None:
    """Load the model and answer lines; with none there is nothing to load, on any rank.

    Raises:
        MistralChatError: the model cannot be loaded, or OUT not written.
        BrokenPipeError: the reader of stdout has gone.
    """
    from mistral_chat.engine.launch import launched_rank

    if not lines and launched_rank() is None:
        return
    from mistral_chat.chat.batch import answer_many
    from mistral_chat.chat.chat import Answer
    from mistral_chat.chat.tokenizer import Tokenizer
    from mistral_chat.cli import render
    from mistral_chat.engine.engine import Engine
    from mistral_chat.engine.launch import current_group, visible_gpus
    from mistral_chat.engine.runner import load_runner
    from mistral_chat.model.args import read_args

    def end_process(message: str, code: int = FAILED) -> None:
        progress.clear()
        if message:
            render.error(message)
        os._exit(code)

    group = current_group()
    group.set_on_lost(end_process)
    if at_once is None:
        on_gpu = options.engine.device != "cpu" and visible_gpus()
        at_once = AT_ONCE["cuda" if on_gpu else "cpu"]
    n_slots = group.share(min(at_once, len(lines)))
    if not lines:
        _close_idle(group)
        return
    config = replace(options.engine, max_batch_size=n_slots)
    try:
        if config.model is not None:
            read_args(config.model, config.load_format)  # without a shape no tokenizer is needed
            tokenizer = Tokenizer.from_folder(config.model)
        else:
            tokenizer = Tokenizer.shipped(int((config.shape or {}).get("vocab_size", 0)))
        with render.loading_bar(quiet=options.quiet) as on_loading:
            runner = load_runner(config, group, on_loading)
    except MistralChatError:
        group.expect_end()
        raise
    load_s = time.monotonic() - started
    if runner.notice and not options.quiet:
        render.note(f"mistral-chat: {runner.notice}")
    progress.begin()
    with _parting(group):
        asked = (line.question for line in lines if line.question is not None)
        for number, event in answer_many(Engine(runner), tokenizer, asked, tools):
            line = lines[number]
            if isinstance(event, Answer):
                output.write(_record(line, event, config.model or config.shape, group, load_s))
                progress.count()
            elif isinstance(event, PromptError):
                output.write(_error_record(line, str(event)))
                progress.count(failed=True)
            else:
                progress.add_token()


def _close_idle(group: "Group") -> None:
    """Part without having loaded anything.

    gloo's thread still has the last exchange's tensor to let go of. A process that ends within
    that millisecond is aborted: the thread then asks for a Python that is going.
    """
    time.sleep(SETTLE_S)
    group.close()


@contextlib.contextmanager
def _parting(group: "Group") -> Iterator[None]:
    """End the other ranks with a block, in peace unless what failed may be theirs."""
    try:
        yield
    except (MistralChatError, BrokenPipeError):
        group.send(None)
        group.close()
        raise
    except Exception:
        group.await_verdict()
        group.expect_end()
        raise
    group.send(None)
    group.close()


def _end_on_signals(progress: "_Progress") -> None:
    """Have Ctrl-C and SIGTERM end the process between two writes; what is in OUT stays."""

    def on_signal(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        progress.interrupted()
        os._exit(128 + signum)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


# IN


def _read_source(source: str) -> tuple[bytes, os.stat_result]:
    """All of IN, and what kind of file it is."""
    try:
        if source != "-":
            with Path(source).open("rb") as file:
                return file.read(), os.fstat(file.fileno())
        if sys.stdin is None:
            raise PromptError("IN is - and stdin is closed: expected lines on stdin")
        return sys.stdin.buffer.read(), os.fstat(sys.stdin.fileno())
    except OSError as error:
        raise PromptError(f"{source}: cannot be read ({error.strerror})") from error


def read_lines(data: bytes, options: flags.Options, system: str | None) -> list[Line]:
    """The lines of IN, those that cannot be answered included; empty ones are none.

    Args:
        data: all of IN.
        options: their sampling is the default; instruct makes a prompt a message.
        system: put before a conversation that has no system message.
    """
    found: list[Line] = []
    owners: dict[str | int, int] = {}
    for number, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not text.strip():
            continue
        id_: str | int = number
        question = None
        error = None
        try:
            value = _read_object(text)
            id_ = _read_id(value, number)
            question = _read_question(value, options, system)
        except _LineError as fault:
            error = f"line {number}: {fault}"
        if id_ in owners:
            question = None
            shown = json.dumps(id_, ensure_ascii=False)
            error = (
                f"line {number}: the id {shown} is that of line {owners[id_]} already: expected "
                f"one of its own"
            )
        owners.setdefault(id_, number)
        found.append(Line(number=number, id=id_, question=question, error=error))
    return found


def _read_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _LineError(f"not UTF-8 text: byte 0x{text[error.start]:02x}") from error
    except RecursionError as error:
        raise _LineError("not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise _LineError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _LineError("expected a JSON object with prompt or messages")
    if _SURROGATE.search(text) and _is_torn(json.dumps(value, ensure_ascii=False)):
        raise _LineError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    return value


def _is_torn(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which has no UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _read_id(value: Mapping[str, Any], number: int) -> str | int:
    name = "custom_id" if "custom_id" in value or "body" in value else "id"
    id_ = value.get(name)
    if id_ is None:
        return number
    if isinstance(id_, (str, int)) and not isinstance(id_, bool):
        return id_
    raise _LineError(f"{name} is {_shown(id_)}: expected a text or a whole number")


def _read_question(
    value: Mapping[str, Any], options: flags.Options, system: str | None
) -> Question:
    instruct = options.instruct
    if "custom_id" in value or "body" in value:
        value, url = _read_body(value)
        instruct = instruct and url is None  # with a url it has said which of the two it is
    else:
        _check_names(value, _FIELDS, "")
    prompt, messages, tools = (value.get(name) for name in ("prompt", "messages", "tools"))
    if (prompt is None) == (messages is None):
        raise _LineError("expected either prompt or messages")
    if prompt is not None and not isinstance(prompt, str):
        raise _LineError(f"prompt is {_shown(prompt)}: expected a text")
    if messages is not None and not _is_list_of(messages, dict):
        raise _LineError(f"messages are {_shown(messages)}: expected a list of objects")
    if tools is not None and not _is_list_of(tools, dict):
        raise _LineError(f"tools are {_shown(tools)}: expected a list of function schemas")
    params = _read_sampling(value, options.sampling)
    if prompt is not None and not instruct:
        if tools:
            raise _LineError("tools need messages, or a prompt with --instruct")
        return Question(prompt=prompt, params=params)
    if messages is None:
        messages = [{"role": "user", "content": prompt}]
    if system is not None and not any(m.get("role") == "system" for m in messages):
        messages = [{"role": "system", "content": system}, *messages]
    return Question(messages=messages, tools=tools, params=params)


def _read_body(value: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The body of a line in OpenAI's form with our names for its fields, and its url."""
    _check_names(value, _OPENAI_FIELDS, " in a line with custom_id or body")
    method, url, body = (value.get(name) for name in ("method", "url", "body"))
    if method not in (None, "POST"):
        raise _LineError(f"method is {_shown(method)}: expected POST")
    if url not in (None, _CHAT_URL, _COMPLETION_URL):
        raise _LineError(f"url is {_shown(url)}: expected {_CHAT_URL} or {_COMPLETION_URL}")
    if not isinstance(body, dict):
        raise _LineError(f"body is {_shown(body)}: expected an object")
    _check_names(body, _BODY_FIELDS, " in body")
    needed = {_CHAT_URL: "messages", _COMPLETION_URL: "prompt"}.get(url or "")
    if needed and body.get(needed) is None:
        raise _LineError(f"body has no {needed}, which {url} needs")
    for name, neutral in _NEUTRAL.items():
        if body.get(name) not in (None, *neutral):
            found = _shown(body[name])
            raise _LineError(
                f"{name} is {found}: expected {_shown(neutral[0])}, or to leave it out"
            )
    fields = {name: body[name] for name in body if name in _FIELDS}
    if body.get("max_completion_tokens") is not None:
        fields["max_tokens"] = body["max_completion_tokens"]
    if isinstance(body.get("logprobs"), bool):  # of a chat: a switch, and a number beside it
        top = body.get("top_logprobs")
        fields["logprobs"] = (0 if top is None else top) if body["logprobs"] else None
    elif body.get("top_logprobs") is not None:
        raise _LineError("top_logprobs needs logprobs to be true")
    return fields, url


def _check_names(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [name for name in value if name not in known]
    if unknown:
        raise _LineError(f"unknown field {_shown(unknown[0])}{where}: expected {', '.join(known)}")


def _read_sampling(value: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    changes: dict[str, Any] = {}
    for name in _SAMPLING:
        found = value.get(name)
        if found is None:
            continue
        if name in _WHOLE and type(found) is not int:
            raise _LineError(f"{name} is {_shown(found)}: expected a whole number")
        if name in _NUMBERS:
            try:
                if isinstance(found, bool) or not isinstance(found, (int, float)):
                    raise TypeError
                found = float(found)
            except (TypeError, OverflowError):
                raise _LineError(f"{name} is {_shown(found)}: expected a number") from None
        if name == "stop":
            found = [found] if isinstance(found, str) else found
            if not _is_list_of(found, str):
                raise _LineError(f"stop is {_shown(found)}: expected a text or a list of texts")
        changes[name] = found
    try:
        return replace(defaults, **changes)
    except UsageError as error:
        raise _LineError(str(error).removeprefix("--")) from error


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


# OUT


def _record(
    line: Line, answer: "Answer", model: object, group: "Group", load_s: float
) -> dict[str, Any]:
    from mistral_chat.cli import render

    text = render.answer_json(answer, model=str(model), world_size=group.world_size, load_s=load_s)
    value: dict[str, Any] = json.loads(text)
    return {"id": line.id} | value


def _error_record(line: Line, error: str) -> dict[str, Any]:
    named = error if _ERROR_LINE.match(error) else f"line {line.number}: {error}"
    return {"id": line.id, "error": named}


class _Output:
    """OUT: open, locked and known to be this input's, or stdout.

    Args:
        target: its path, or `-`.
        source: of IN, which must be another file.

    Raises:
        OutputError: it cannot be written, or another run is writing it.
        UsageError: it is IN.
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
            if self._is_file:
                self._lock()
            if is_new and self._is_file:  # the name must outlive a power cut as well
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written ({error.strerror})") from error

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _refuse_source(self, found: os.stat_result, source: os.stat_result) -> None:
        if stat.S_ISREG(found.st_mode) and os.path.samestat(found, source):
            raise UsageError(f"IN and OUT are the same file ({self._target}): expected two")

    def _lock(self) -> None:
        assert self._fd is not None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{self._target}: another run is writing it: wait for its end, or name another OUT"
            ) from error
        except OSError:
            return  # a file system without locks

    def resume(self, lines: Sequence[Line]) -> tuple[set[int], int]:
        """Read what an earlier run wrote, and cut off a line that it did not finish.

        Returns:
            the numbers of the lines that need no run, and how many of them have an error.

        Raises:
            OutputError: it holds something else than answers to these lines.
        """
        if self._fd is None or not self._is_file:
            return set(), 0
        by_number = {line.number: line for line in lines}
        owners = {line.id: line for line in reversed(lines)}
        done: set[int] = set()
        n_errors = end = 0
        torn = b""
        with Path(self._target).open("rb") as file:
            for place, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    torn = text.rstrip(b"\0")  # what a power cut leaves of an append
                    break
                end += len(text)
                id_, error = self._read_record(text, place)
                # A line whose id is another's has its error by its number.
                named = _ERROR_LINE.match(error or "")
                line = by_number.get(int(named[1])) if named else None
                if line is None or line.id != id_:
                    line = owners.get(id_)
                if line is None or line.number in done:
                    why = "is not in IN" if line is None else "is there twice"
                    raise self._foreign(place, f"the id {_shown(id_)} {why}")
                done.add(line.number)
                n_errors += error is not None
        if not (torn.startswith(_RECORD_START) or _RECORD_START.startswith(torn)):
            raise self._foreign(len(done) + 1, "it is no answer of ours")
        try:
            if os.fstat(self._fd).st_size > end:
                os.ftruncate(self._fd, end)
                os.fsync(self._fd)
        except OSError as error:
            raise OutputError(f"{self._target}: cannot be written ({error.strerror})") from error
        return done, n_errors

    def _read_record(self, text: bytes, place: int) -> tuple[str | int, str | None]:
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
        return id_, error

    def _foreign(self, place: int, why: str) -> OutputError:
        return OutputError(
            f"{self._target}, line {place}: {why}: expected what a run of this IN wrote, or an "
            f"OUT that is empty or new"
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record as one line, and return when the disk has it.

        Raises:
            OutputError: it cannot be written, such as to a full disk.
            BrokenPipeError: the reader has gone.
        """
        text = json.dumps(record, ensure_ascii=False).translate(_LINE_ENDS) + "\n"
        if self._fd is None:
            from mistral_chat.cli import render

            render.say(text)
            return
        left = memoryview(text.encode())
        try:
            while left:  # one write, but where a disk fills up or a pipe takes less
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


# stderr


class _Progress:
    """Counts, a line that stays up to date on a terminal, and one at the end elsewhere.

    Args:
        total: lines of IN.
        done: of them, those that an earlier run wrote.
        n_errors: of those, the ones with an error.
        quiet: nothing but errors.
    """

    def __init__(self, total: int, done: int, n_errors: int, *, quiet: bool) -> None:
        from mistral_chat.cli.terminal import is_fancy

        self._total = total
        self._before = self._done = done
        self._n_errors = n_errors
        self._quiet = quiet
        self._live = is_fancy(sys.stderr) and not quiet
        self._is_drawn = False
        self._n_tokens = 0
        self._n_answered = 0
        self._started: float | None = None
        self._shown_at = 0.0

    def begin(self) -> None:
        """The model is loaded."""
        self._started = time.monotonic()

    def add_token(self) -> None:
        """A token was chosen."""
        self._n_tokens += 1
        self._show()

    def count(self, *, failed: bool = False) -> None:
        """A line was written."""
        self._done += 1
        self._n_errors += failed
        self._n_answered += not failed
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if not self._live or self._started is None or now - self._shown_at < SHOW_EVERY_S:
            return
        self._shown_at = now
        elapsed_s = now - self._started
        parts = [f"{self._done:,}/{self._total:,}", f"{self._n_tokens / elapsed_s:.1f} tokens/s"]
        if self._n_answered:
            left_s = round((self._total - self._done) * elapsed_s / self._n_answered)
            parts.append(f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left")
        if self._n_errors:
            parts.append(f"{self._n_errors:,} with an error")
        self._draw(f"\r{', '.join(parts)}\x1b[K")
        self._is_drawn = True

    def _draw(self, text: str) -> None:
        # Past Python's buffer, whose lock a signal's handler may find taken.
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), text.encode())

    def clear(self) -> None:
        """Take the line off the terminal, and give back the cursor that the loading bar hides."""
        if self._live and self._started is None:
            self._draw("\x1b[?25h")
        if self._is_drawn:
            self._is_drawn = False
            self._draw("\r\x1b[K")

    def interrupted(self) -> None:
        """Say how far it came; safe in a signal's handler."""
        self.clear()
        if not self._quiet and sys.stderr is not None:
            self._draw(
                f"mistral-chat: interrupted: {self._done:,} of {self._total:,} lines are written\n"
            )

    def finish(self) -> int:
        """Say what came of it; the code to end with."""
        from mistral_chat.cli import render

        self.clear()
        if self._n_errors:
            render.error(
                f"{self._n_errors:,} of {self._total:,} lines have an error, which their line of "
                f"OUT says"
            )
            return FAILED
        if not self._quiet:
            render.note(f"mistral-chat: {self._summary()}")
        return 0

    def _summary(self) -> str:
        parts = [f"{self._total:,} lines answered"]
        if self._before:
            parts[0] += f" ({self._before:,} of them before)"
        if self._started is not None:
            elapsed_s = time.monotonic() - self._started
            parts.append(f"{self._n_tokens:,} tokens, {self._n_tokens / elapsed_s:.1f} tokens/s")
        return ", ".join(parts)
