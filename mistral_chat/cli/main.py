"""The entry: the commands, which rank this is, and which code to end with.

A command is a function: what it returns is its request, whose fields are its flags, and its
docstring is its help. It says what words without a name are; nothing is run or imported that takes
time before there is a request. Errors become one line and a code here and nowhere else.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistral_chat.cli import command_line
from mistral_chat.cli.begun import Begun
from mistral_chat.cli.codes import INTERRUPTED, WRONG_USAGE, code_of
from mistral_chat.cli.console import printing
from mistral_chat.cli.interrupts import noting_interrupts
from mistral_chat.cli.pipes import keep_pipes
from mistral_chat.cli.requests import (
    BatchRequest,
    BenchRequest,
    ChatRequest,
    DemoRequest,
    DownloadRequest,
    InspectRequest,
    QuantizeRequest,
    make,
    place_of,
)
from mistral_chat.engine.ranks.launch import (
    is_launched,
    launched_rank,
    set_up_environment,
)
from mistral_chat.errors import MistralChatError, UsageError, shown

__all__ = ["COMMANDS", "main", "request_of"]

RANK_0_SPEAKS_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the code to end with.

    A rank that a launcher started ends its process here: gloo's threads now and then outlive the
    interpreter and abort it (torch 2.13).
    """
    code = _run(argv)
    if "torch.distributed" in sys.modules and is_launched():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.flush()
        os._exit(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    begun = Begun.now()
    set_up_environment()
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    with noting_interrupts() as was_interrupted:
        try:
            return _leave(_command(words, begun))
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            if was_interrupted():
                return INTERRUPTED
            if isinstance(error, BrokenPipeError):
                return _leave(0)
            if not isinstance(error, MistralChatError):
                raise
            _say_once(error)
            return code_of(error)


def _leave(code: int) -> int:
    """Flush what was printed; a reader that has gone is no failure."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes again at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _say_once(error: MistralChatError) -> None:
    """Every rank reads the same flags; rank 0 says what is wrong with them.

    The others leave it the time to: the first rank that ends has torchrun end all. One that is
    still there after that is wrong alone, such as for want of a file on its machine, and says so.
    """
    try:
        speaks = launched_rank() in (None, 0)
    except UsageError:  # the launcher's variables are what is wrong
        speaks = True
    if not speaks:
        time.sleep(RANK_0_SPEAKS_S)
    printing.error(error)


def chat(words: Sequence[str] = (), **given: Any) -> ChatRequest:
    """Usage: mistral-chat MODEL [PROMPT] [flags]

    Talk to a Mistral model. Without a prompt, at a terminal: a chat. With a
    prompt, or with text on stdin: one answer on stdout.

      MODEL                   a model's folder, or a downloaded repository
                              (owner/name); PROMPT is --prompt

    {flags}

    commands: mistral-chat demo talks to a small embedded model, download fetches
    a model, inspect says what one is and whether it fits, quantize writes it in
    half or a quarter of the bytes, bench measures, batch answers a file of
    prompts; each has its --help. Under torchrun: torchrun
    --nproc-per-node 8 --no-python mistral-chat MODEL --instruct. - and _ in flags
    are the same. Codes: 0 answered, 1 failed, 2 wrong usage, 130 interrupted.
    """
    model, *texts = words or (None,)
    return make(ChatRequest, model, given | _prompt(texts, given))


def demo(words: Sequence[str] = (), **given: Any) -> DemoRequest:
    """Usage: mistral-chat demo [PROMPT] [flags]

    The same as mistral-chat MODEL --instruct on the embedded model, a chat on 2
    ranks; --path prints its folder.

    {flags}
    """
    return make(DemoRequest, "demo", given | _prompt(words, given) | {"instruct": True})


def _prompt(texts: Sequence[str | None], given: dict[str, Any]) -> dict[str, Any]:
    """The prompt that stands after MODEL."""
    found = shown(" ".join(map(str, texts)), 100)
    if len(texts) > 1:
        raise UsageError(
            f"found {len(texts)} words after MODEL: expected one MODEL and one text, which is "
            f"quoted: mistral-chat MODEL {found}"
        )
    if texts and "prompt" in given:
        raise UsageError(f"found the text {found} after MODEL and --prompt: expected one of them")
    return {"prompt": texts[0]} if texts else {}


def download(words: Sequence[str] = (), **given: Any) -> DownloadRequest:
    """Usage: mistral-chat download OWNER/NAME [DIR] [flags]

    Fetch one weight layout of a Hugging Face repository, with its shape and its tokenizer. The last
    line on stdout is the folder, so that mistral-chat "$(mistral-chat download OWNER/NAME)" works.
    Without DIR it lies in huggingface_hub's cache, and mistral-chat OWNER/NAME finds it there. What
    an interrupted download fetched is kept: the same command goes on from there.

    {flags}

    HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_CACHE mean what they mean to huggingface_hub.
    """
    from mistral_chat.cli.repository import is_name

    if not words:
        raise UsageError("OWNER/NAME is missing: expected a repository, such as mistralai/NAME")
    if len(words) > 2:
        raise UsageError(f"found {len(words)} words: expected OWNER/NAME and at most one DIR")
    if not is_name(words[0]):
        raise UsageError(f"{words[0]!r} is no repository's name: expected OWNER/NAME")
    folder = Path(words[1]) if len(words) > 1 else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: expected a folder, or a name that is free")
    return DownloadRequest(repo=words[0], folder=folder, **given)


def quantize(words: Sequence[str] = (), **given: Any) -> QuantizeRequest:
    """Usage: mistral-chat quantize MODEL DIR --quantization fp8|int8|int4 [flags]

    Write a model of floats as a compressed-tensors checkpoint in Hugging Face's layout, which this
    program and transformers read: half or a quarter of the bytes, and nothing to quantize at
    each start. Files that an interrupted run wrote are kept: the same command goes on from there.

    {flags}
    """
    if len(words) != 2:
        found = shown(" ".join(words), 150) if words else "nothing"
        raise UsageError(f"found {found}: expected MODEL DIR")
    if "quantization" not in given:
        raise UsageError("--quantization is missing: expected fp8, int8 or int4")
    model, folder = words
    return QuantizeRequest(model=place_of(model), folder=Path(folder), **given)


def inspect(words: Sequence[str] = (), **given: Any) -> InspectRequest:
    """Usage: mistral-chat inspect MODEL [flags]

    Say what a model is and what each rank would hold of it, without loading a weight. Ranks beyond
    this machine's GPUs are taken to have GPUs like them.

    {flags}
    """
    return make(InspectRequest, _only_model(words), given)


def bench(words: Sequence[str] = (), **given: Any) -> BenchRequest:
    """Usage: mistral-chat bench MODEL [flags]

    Measure decode, time to first token, sums over ranks, start and memory, beside what this machine
    can do at most.

    {flags}
    """
    return make(BenchRequest, _only_model(words), given)


def _only_model(words: Sequence[str]) -> str | None:
    if len(words) > 1:
        found = shown(" ".join(words[1:]), 100)
        raise UsageError(f"found {found} after MODEL: expected one MODEL and flags")
    return words[0] if words else None


def batch(words: Sequence[str] = (), **given: Any) -> BatchRequest:
    """Usage: mistral-chat batch MODEL IN.jsonl OUT.jsonl [flags]

    Answer every line of IN, several at once, and write each answer to OUT as it ends: the object of
    --json, with its id before it. The same command again goes on where it was: nothing is lost or
    answered twice. - is stdin or stdout (which holds nothing to go on from). A line that has an
    error in OUT is done, too; with --retry_errors such errors leave OUT and their lines are run
    again.

    A line of IN is an object with
      prompt               a text: one message with --instruct, else to be completed
      messages             or a conversation, in the chat template: [{"role": ..., "content": ...}]
      id                   what to call it (its line's number from 1)
      tools                function schemas, in place of --tools; calls are reported, never run
      json_schema          a schema (an object) that the answer is valid against, in place of the
                           flag's
      json_object          true: a JSON object; false: free text
      {sampling}    in place of the flags'
    or a line of OpenAI's batch files: custom_id, method, url, body (a prompt there is completed).
    A line that cannot be answered becomes {"id": ..., "error": "line N: ..."}; the rest goes on.
    JSON that was cut, with finish_reason length, is there with such an error beside it.

    {flags}

    Codes: 0 all answered, 1 failed or a line has an error, 2 wrong usage, 130 interrupted.
    """
    # Weights at random need no folder, but then the shape comes from --config.
    if len(words) != 3 and not (len(words) == 2 and "config" in given):
        found = " ".join(map(repr, words)) or "nothing"
        raise UsageError(f"found {found}: expected MODEL IN.jsonl OUT.jsonl")
    *model, source, target = words
    files = {"source": source, "target": target}
    return make(BatchRequest, model[0] if model else None, given | files)


COMMANDS: dict[str, command_line.Command] = {
    "chat": chat,  # stands on no command line: what names no command is a model to talk to
    "demo": demo,
    "download": download,
    "inspect": inspect,
    "quantize": quantize,
    "bench": bench,
    "batch": batch,
}


def request_of(words: Sequence[str]) -> Any:
    """The request that words ask for, or a text such as help; see `command_line.read`."""
    return command_line.read(COMMANDS, words, "chat")


def _command(words: list[str], begun: Begun) -> int:
    if launched_rank() is None:
        words = keep_pipes(words, _say_that_it_waits("--quiet" not in words))
    _refuse_misspelt_command(words)
    request = request_of(words or ["--help"])
    if isinstance(request, str):
        if launched_rank() in (None, 0):
            print(request, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else WRONG_USAGE
    if isinstance(request, BenchRequest):
        from mistral_chat.cli.bench import run as bench_run

        return bench_run.run(request, words, begun)
    if isinstance(request, DownloadRequest):
        from mistral_chat.cli.hub import download as download_run

        return download_run.run(request)
    if isinstance(request, QuantizeRequest):
        from mistral_chat.cli.quantize import run as quantize_run

        return quantize_run.run(request)
    if isinstance(request, InspectRequest):
        from mistral_chat.cli.inspect import run as inspect_run

        return inspect_run.run(request)
    if isinstance(request, BatchRequest):
        from mistral_chat.cli.batch import run as batch_run

        return batch_run.run(request, words, begun)
    if isinstance(request, DemoRequest):
        return _demo(request, words[1:], begun)
    from mistral_chat.cli.talk import run as talk

    return talk.run(request, words, begun)


def _refuse_misspelt_command(words: Sequence[str]) -> None:
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        from mistral_chat.cli.suggestions import near_command

        if near := near_command(words[0], [name for name in COMMANDS if name != "chat"]):
            raise UsageError(
                f"{shown(words[0])} is neither a command nor a folder: did you mean "
                f"mistral-chat {near}?"
            )


def _say_that_it_waits(speaks: bool) -> Callable[[str], None]:
    def say(pipe: str) -> None:
        if speaks:
            printing.note(f"mistral-chat: waiting for {shown(pipe)} to end, which is a pipe")

    return say


def _demo(request: DemoRequest, words: list[str], begun: Begun) -> int:
    """The main job on the embedded model, which ranks are given as any other."""
    from mistral_chat.cli.hub.embedded import embedded_model
    from mistral_chat.cli.talk import run as talk
    from mistral_chat.engine.ranks.launch import visible_gpus

    speaks = not request.quiet and launched_rank() in (None, 0)

    def say(line: str) -> None:
        if speaks:
            printing.note(f"mistral-chat: {line}")

    folder = embedded_model(on_progress=say, show_bar=speaks)
    if request.path:
        print(folder)
        return 0
    request = replace(request, engine=replace(request.engine, model=folder))
    if request.nproc_per_node is None and launched_rank() is None:
        # Two ranks of one GPU cannot speak through NCCL; two of a CPU can through gloo.
        on_gpus = request.engine.device != "cpu" and visible_gpus()
        request = replace(request, nproc_per_node=min(2, on_gpus) if on_gpus else 2)
    own = [str(folder), "--instruct", f"--nproc_per_node={request.nproc_per_node}"]
    return talk.run(request, [*own, *words], begun)
