"""`mistral-chat batch`: a file of prompts in, a file of answers out, several at once, resumable.

Every answer is written when it ends, and a run that finds OUT goes on with the lines of IN that it
lacks. Rank 0 alone knows the files.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mistral_chat.chat.template import check_effort_of_file
from mistral_chat.cli import start
from mistral_chat.cli.batch.lines import Line, asks_json, check_source, read_lines, read_source
from mistral_chat.cli.batch.output import Output, check_target, error_record
from mistral_chat.cli.batch.progress import Progress
from mistral_chat.cli.begun import Begun, say_what_starts
from mistral_chat.cli.codes import FAILED
from mistral_chat.cli.offered import Offered, read_offered, say_of_default
from mistral_chat.cli.pipes import keep_pipe
from mistral_chat.cli.requests import BatchRequest
from mistral_chat.cli.suggestions import require_model
from mistral_chat.engine.ranks.launch import launched_rank
from mistral_chat.errors import OtherRankFailedError, PromptError, UsageError

if TYPE_CHECKING:
    from mistral_chat.chat.answer import Answer
    from mistral_chat.engine.engine import Engine
    from mistral_chat.engine.ranks.group import Group
    from mistral_chat.model.folder import ModelFolder

__all__ = ["run"]

AT_ONCE = {"cuda": 8, "cpu": 4}
SETTLE_S = 0.1


def run(request: BatchRequest, words: Sequence[str], begun: Begun) -> int:
    """Run the command on this rank; the code to end with.

    Args:
        request: of the command line.
        words: the command line itself, for ranks that are started.
        begun: when it was.
    """
    rank = launched_rank()
    if rank is None:  # ranks that are started do not inherit a shell's pipe
        source = keep_pipe(request.source, lambda _: None)
        words = [source if word == request.source else word for word in words]
        request = replace(request, source=source)
    if rank:
        start.launch(request, words)
        return _follow(request)
    require_model(request.engine.model)
    say_what_starts(request, begun, quiet=request.quiet)
    check_source(request.source)
    check_target(request.target)
    folder = start.check(request)
    if request.reasoning is not None:
        check_effort_of_file(request.reasoning, folder.tokenizer_file)
    offered = read_offered(request)
    with begun.handed_on():
        code = start.launch(request, words, folder.args.n_heads)
    return _lead(request, folder, offered, begun) if code is None else code


def _follow(request: BatchRequest) -> int:
    """Any rank but 0: hear whether there is anything to do, then serve."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once and without a word
    from mistral_chat.engine.ranks.launch import current_group

    group = current_group()
    n_slots = group.share(None)
    if not n_slots:
        _close_idle(group)
        return 0
    return start.follow(replace(request.engine, max_batch_size=n_slots))


def _lead(request: BatchRequest, folder: "ModelFolder", offered: Offered, begun: Begun) -> int:
    """Rank 0: read IN and OUT, load if anything is left to do, answer."""
    data, source_stat = read_source(request.source)
    lines = read_lines(data, request, offered.system)
    if not lines:
        raise PromptError(
            f"{request.source}: nothing to answer: expected a JSON object on every line"
        )
    with Output(request.target, source_stat) as output:
        done, n_errors = output.resume(
            lines, _model_name(request), retry_errors=request.retry_errors
        )
        progress = Progress(
            len(lines), len(done), n_errors, quiet=request.quiet, can_retry=output.is_file
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
        if not _answer(request, folder, todo, offered, output, progress, begun):
            return FAILED
    return progress.finish()


def _answer(
    request: BatchRequest,
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
    from mistral_chat.engine.ranks.launch import current_group, visible_gpus

    group = current_group()
    start.end_with(group, progress.clear)
    at_once = request.max_batch_size
    if at_once is None:
        on_gpu = request.engine.device != "cpu" and visible_gpus()
        at_once = AT_ONCE["cuda" if on_gpu else "cpu"]
    n_slots = group.share(min(at_once, len(lines)))
    if not lines:
        _close_idle(group)
        return True
    config = replace(request.engine, max_batch_size=n_slots)
    try:
        loaded = start.load(config, folder, group, begun.at, quiet=request.quiet)
    except OtherRankFailedError:
        return False
    say_of_default(request)
    progress.begin()
    with start.parting(group):
        engine = Engine(loaded.runner)
        questions = (line.question for line in lines if line.question is not None)
        answers = answer_many(engine, loaded.tokenizer, questions, offered.tools, offered.grammar)
        for number, event in answers:
            line = lines[number]
            if isinstance(event, Answer):
                record = _record(line, event, request, loaded.load_s, engine)
                output.write(record)
                progress.count(failed="error" in record)
            elif isinstance(event, (PromptError, UsageError)):
                output.write(error_record(line, str(event)))
                progress.count(answered=False, failed=True)
            else:
                progress.add_token()
    return True


def _record(
    line: Line, answer: "Answer", request: BatchRequest, load_s: float, engine: "Engine"
) -> dict[str, Any]:
    """A line's record: its id, the object of --json, and what is wrong with that if anything is."""
    from mistral_chat.cli.console import render

    model = _model_name(request)
    world_size = engine.runner.group.world_size
    text = render.answer_json(answer, model=model, world_size=world_size, load_s=load_s)
    value: dict[str, Any] = {"id": line.id} | json.loads(text)
    assert line.question is not None
    is_json = line.question.is_json(by_default=asks_json(request))
    if is_json and answer.finish_reason == "length":
        cut = render.notice_of(answer, line.question.params, engine.max_seq_len)
        value |= error_record(line, f"{cut}: the answer is no whole JSON text; give it more room")
    return value


def _model_name(request: BatchRequest) -> str:
    return str(request.engine.model or request.engine.shape)


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
