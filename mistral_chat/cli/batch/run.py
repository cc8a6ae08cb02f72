"""`mistral-chat batch`: a file of prompts in, a file of answers out, several at once, resumable.

Every answer is written when it ends, and a run that finds OUT goes on with the lines of IN that it
lacks. Rank 0 alone knows the files.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mistral_chat.cli import flags, start
from mistral_chat.cli.batch.lines import Line, asks_json, check_source, read_lines, read_source
from mistral_chat.cli.batch.output import Output, check_target, error_record
from mistral_chat.cli.batch.progress import Progress
from mistral_chat.cli.begun import Begun, say_what_starts
from mistral_chat.cli.codes import FAILED
from mistral_chat.cli.offered import Offered, read_offered
from mistral_chat.cli.pipes import keep_pipe
from mistral_chat.cli.suggestions import require_model
from mistral_chat.cli.words import OwnFlag, read_own, split, whole_from
from mistral_chat.engine.launch import launched_rank
from mistral_chat.errors import PromptError, UsageError

if TYPE_CHECKING:
    from mistral_chat.chat.answer import Answer
    from mistral_chat.engine.engine import Engine
    from mistral_chat.engine.group import Group
    from mistral_chat.model.folder import ModelFolder

__all__ = ["run"]

AT_ONCE = {"cuda": 8, "cpu": 4}
SETTLE_S = 0.1
HELP = """usage: mistral-chat batch MODEL IN.jsonl OUT.jsonl [flags]

Answer every line of IN, several at once, and write each answer to OUT as it ends: the object of
--json, with its id before it. The same command again goes on where it was: nothing is lost or
answered twice. - is stdin or stdout (which holds nothing to go on from). A line that has an error
in OUT is done, too; with --retry_errors such errors leave OUT and their lines are run again.

A line of IN is an object with
  prompt               a text: one message with --instruct, else to be completed
  messages             or a conversation, in the chat template: [{"role": ..., "content": ...}]
  id                   what to call it (its line's number from 1)
  tools                function schemas, in place of --tools; calls are reported, never run
  json_schema          a schema (an object) that the answer is valid against, in place of the flag's
  json_object          true: a JSON object; false: free text
  max_tokens temperature top_p top_k min_p seed stop logprobs    in place of the flags'
or a line of OpenAI's batch files: custom_id, method, url, body (a prompt there is completed).
A line that cannot be answered becomes {"id": ..., "error": "line N: ..."}; the rest goes on. JSON
that was cut, with finish_reason length, is there with such an error beside it.

  --max_batch_size N   sequences that decode together (8 on GPUs, 4 on CPU)
  --retry_errors       run lines again that had an error, such as after IN was mended
  and of the main job: --instruct --system --system_file --tools --json_schema --json_object
  --max_tokens --temperature --top_p --top_k --min_p --seed --stop --logprobs --quiet
  --nproc_per_node --device --dtype --max_seq_len --config --load_format

Codes: 0 all answered, 1 failed or a line has an error, 2 wrong usage, 130 interrupted.
"""
_OWN = {"max_batch_size": whole_from(1), "retry_errors": OwnFlag()}
_SHARED = ("instruct", "quiet", "system", "system_file", "tools", "json_schema", "json_object",
           "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logprobs",
           "nproc_per_node", "device", "dtype", "max_seq_len", "config", "load_format")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to answer, and where to.

    Args:
        options: of the main job; lines may say otherwise.
        source: IN.
        target: OUT.
        at_once: sequences that decode together; None leaves it to the machine.
        retry_errors: run lines again whose record in OUT has an error.
    """

    options: flags.Options
    source: str
    target: str
    at_once: int | None = None
    retry_errors: bool = False


def run(words: Sequence[str], begun: Begun) -> int:
    """Run the command on this rank; the code to end with."""
    own, rest = read_own(words, _OWN, flags.shared(*_SHARED))
    rank = launched_rank()
    if own is None:
        if not rank:
            print(HELP, end="")
        return 0
    asked = _read(rest, own.get("max_batch_size"), retry_errors="retry_errors" in own)
    if rank is None:  # ranks that are started do not inherit a shell's pipe
        source = keep_pipe(asked.source, lambda _: None)
        words = [source if word == asked.source else word for word in words]
        asked = replace(asked, source=source)
    if rank:
        start.launch(asked.options, ["batch", *words])
        return _follow(asked.options)
    options = asked.options
    require_model(options.engine.model)
    say_what_starts(options, begun)
    check_source(asked.source)
    check_target(asked.target)
    folder = start.check(options)
    offered = read_offered(options)
    with begun.handed_on():
        code = start.launch(options, ["batch", *words], folder.args.n_heads)
    return _lead(asked, folder, offered, begun) if code is None else code


def _read(words: Sequence[str], at_once: int | None, *, retry_errors: bool) -> Asked:
    given, places = split(words)
    # Weights at random need no folder, but then the shape comes from --config.
    has_shape = any(word.startswith("--config=") for word in given)
    if len(places) != 3 and not (len(places) == 2 and has_shape):
        found = " ".join(map(repr, places)) or "nothing"
        raise UsageError(f"found {found}: expected MODEL IN.jsonl OUT.jsonl")
    *model, source, target = places
    if retry_errors and target == "-":
        raise UsageError("--retry_errors and OUT is -: expected a file that an earlier run wrote")
    options = flags.parse(["--json", *given, "--", *model])
    if options.tools is not None and options.tools.suffix == ".py":
        raise UsageError(
            f"--tools {options.tools}: batch runs no functions, it reports calls: expected a .json "
            f"file of function schemas"
        )
    return Asked(
        options=options, source=source, target=target, at_once=at_once, retry_errors=retry_errors
    )


def _follow(options: flags.Options) -> int:
    """Any rank but 0: hear whether there is anything to do, then serve."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once and without a word
    from mistral_chat.engine.launch import current_group

    group = current_group()
    n_slots = group.share(None)
    if not n_slots:
        _close_idle(group)
        return 0
    return start.follow(replace(options.engine, max_batch_size=n_slots))


def _lead(asked: Asked, folder: "ModelFolder", offered: Offered, begun: Begun) -> int:
    """Rank 0: read IN and OUT, load if anything is left to do, answer."""
    options = asked.options
    data, source_stat = read_source(asked.source)
    lines = read_lines(data, options, offered.system)
    if not lines:
        raise PromptError(
            f"{asked.source}: nothing to answer: expected a JSON object on every line"
        )
    with Output(asked.target, source_stat) as output:
        done, n_errors = output.resume(lines, _model_name(options), retry_errors=asked.retry_errors)
        progress = Progress(
            len(lines), len(done), n_errors, quiet=options.quiet, can_retry=output.is_file
        )
        _end_on_signals(progress)
        todo = []
        for line in lines:
            if line.number in done:
                continue
            if line.question is not None:
                todo.append(line)
                continue
            output.write(error_record(line, line.error or ""))
            progress.count(answered=False, failed=True)
        if not _answer(asked, folder, todo, offered, output, progress, begun):
            return FAILED
    return progress.finish()


def _answer(
    asked: Asked,
    folder: "ModelFolder",
    lines: Sequence[Line],
    offered: Offered,
    output: Output,
    progress: Progress,
    begun: Begun,
) -> bool:
    """Load the model and answer lines; with none there is nothing to load, on any rank.

    Returns:
        whether they are answered: no, where another rank cannot load its share and has said why.

    Raises:
        MistralChatError: the model cannot be loaded, or OUT not written.
        BrokenPipeError: the reader of stdout has gone.
    """
    if not lines and launched_rank() is None:
        return True
    from mistral_chat.chat.answer import Answer
    from mistral_chat.chat.batch import answer_many
    from mistral_chat.engine.engine import Engine
    from mistral_chat.engine.group import PeerFailedError
    from mistral_chat.engine.launch import current_group, visible_gpus

    options = asked.options
    group = current_group()
    start.end_with(group, progress.clear)
    at_once = asked.at_once
    if at_once is None:
        on_gpu = options.engine.device != "cpu" and visible_gpus()
        at_once = AT_ONCE["cuda" if on_gpu else "cpu"]
    n_slots = group.share(min(at_once, len(lines)))
    if not lines:
        _close_idle(group)
        return True
    config = replace(options.engine, max_batch_size=n_slots)
    try:
        loaded = start.load(config, folder, group, begun.at, quiet=options.quiet)
    except PeerFailedError:
        return False
    progress.begin()
    with start.parting(group):
        engine = Engine(loaded.runner)
        questions = (line.question for line in lines if line.question is not None)
        answers = answer_many(engine, loaded.tokenizer, questions, offered.tools, offered.grammar)
        for number, event in answers:
            line = lines[number]
            if isinstance(event, Answer):
                record = _record(line, event, asked, loaded.load_s, engine)
                output.write(record)
                progress.count(failed="error" in record)
            elif isinstance(event, (PromptError, UsageError)):
                output.write(error_record(line, str(event)))
                progress.count(answered=False, failed=True)
            else:
                progress.add_token()
    return True


def _record(
    line: Line, answer: "Answer", asked: Asked, load_s: float, engine: "Engine"
) -> dict[str, Any]:
    """A line's record: its id, the object of --json, and what is wrong with that if anything is."""
    from mistral_chat.cli.console import render

    options = asked.options
    model = _model_name(options)
    world_size = engine.runner.group.world_size
    text = render.answer_json(answer, model=model, world_size=world_size, load_s=load_s)
    value: dict[str, Any] = {"id": line.id} | json.loads(text)
    assert line.question is not None
    is_json = line.question.is_json(by_default=asks_json(options))
    if is_json and answer.finish_reason == "length":
        cut = render.notice_of(answer, line.question.params, engine.max_seq_len)
        value |= error_record(line, f"{cut}: the answer is no whole JSON text; give it more room")
    return value


def _model_name(options: flags.Options) -> str:
    return str(options.engine.model or options.engine.shape)


def _close_idle(group: "Group") -> None:
    """Part without having loaded anything.

    gloo's thread still has the last exchange's tensor to let go of. A process that ends within
    that millisecond is aborted: the thread then asks for a Python that is going.
    """
    time.sleep(SETTLE_S)
    group.close()


def _end_on_signals(progress: "Progress") -> None:
    """Have a signal end the process between two writes; what is in OUT stays."""

    def end(code: int) -> None:
        progress.interrupted()
        os._exit(code)

    start.end_on_signals(end, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
