"""Format answers and loading for the terminal; `printing` writes the text.

Knows formats; knows nothing of where answers come from.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mistral_chat.chat.chat import Answer
from mistral_chat.cli.console.printing import clean, draw, drawn, error, note, say, tell_terminal
from mistral_chat.cli.console.progress import byte_columns
from mistral_chat.cli.console.terminal import is_fancy
from mistral_chat.config import SamplingParams
from mistral_chat.engine.loading import Loading, OnLoading
from mistral_chat.engine.runner import Runner

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "answer_json",
    "draw",
    "error",
    "loading_bar",
    "note",
    "notice_of",
    "say",
    "start_line",
    "stats_line",
    "tell_terminal",
]


def notice_of(answer: Answer, params: SamplingParams, max_seq_len: int) -> str | None:
    """Return what a person should know about how an answer ended; None for a normal end."""
    is_cut = answer.thought is not None and not answer.thought.is_closed
    within = ", within the thinking" if is_cut else ""
    if answer.finish_reason == "length":
        used = answer.usage.prompt_tokens + answer.usage.completion_tokens
        if used >= max_seq_len:
            return f"stopped: the context of {max_seq_len:,} tokens is full{within}"
        limit = answer.usage.completion_tokens
        default = "" if params.max_tokens else ", the default of plain completion"
        return f"stopped at --max_tokens {limit}{default}{within}"
    if answer.finish_reason == "cancelled":
        return "interrupted"
    if answer.finish_reason == "tool_calls":
        names = ", ".join(call.name for call in answer.tool_calls)
        return f"the model asks to call {names}"
    return None


def stats_line(answer: Answer, max_seq_len: int, load_s: float, path: str) -> str:
    """Format the figures of one answer, with the path that its steps took."""
    usage = answer.usage
    parts = [f"{usage.completion_tokens} tokens"]
    if answer.thought is not None:
        parts.append(f"{answer.thought.n_tokens} of them thinking")
    if answer.decode_tokens_per_s is not None:
        parts.append(f"{answer.decode_tokens_per_s:.1f} tokens/s")
    if answer.first_token_s is not None:
        parts.append(f"first after {answer.first_token_s:.2f} s")
    parts.append(f"prompt {usage.prompt_tokens:,} ({usage.cached_tokens:,} cached)")
    left = max_seq_len - usage.prompt_tokens - usage.completion_tokens
    parts += [f"context left {left:,}", f"loaded in {load_s:.1f} s", f"seed {answer.seed}"]
    parts.append(f"decode by {path}")
    return ", ".join(parts)


def start_line(runner: Runner, load_s: float) -> str:
    """Format how long the start took, by phase."""
    start_up = runner.start_up
    assert start_up is not None
    before = load_s - start_up.load_s - runner.group.meet_s
    parts = [f"processes, Python and torch {before:.2f} s"]
    if runner.group.world_size > 1:
        parts.append(f"meeting of ranks {runner.group.meet_s:.2f} s")
    parts.append(f"checks {start_up.check_s:.2f} s")
    n_bytes, seconds = start_up.weights_bytes, start_up.weights_s
    if n_bytes:
        parts.append(
            f"weights {seconds:.2f} s ({n_bytes / 1e9:.2f} GB a rank, "
            f"{n_bytes / seconds / 1e9:.1f} GB/s), beside them kernels {start_up.kernels_s:.2f} s"
        )
    else:
        parts.append(f"kernels {start_up.kernels_s:.2f} s")
    parts.append(f"graphs {start_up.capture_s:.2f} s, tokenizer {start_up.meanwhile_s:.2f} s")
    return f"start {load_s:.2f} s: {', '.join(parts)}"


def answer_json(answer: Answer, *, model: str, world_size: int, load_s: float) -> str:
    """Format the object of `--json` on one line."""
    value: dict[str, Any] = {
        "text": answer.text,
        **({"thinking": answer.thinking} if answer.thinking else {}),
        "finish_reason": answer.finish_reason,
        "tool_calls": [
            {"id": c.id, "name": c.name, "arguments": c.arguments} for c in answer.tool_calls
        ],
        "seed": answer.seed,
        "usage": {
            "prompt_tokens": answer.usage.prompt_tokens,
            "cached_tokens": answer.usage.cached_tokens,
            "completion_tokens": answer.usage.completion_tokens,
        },
        "timings": {
            "load_s": _rounded(load_s),
            "first_token_s": _rounded(answer.first_token_s),
            "decode_tokens_per_s": _rounded(answer.decode_tokens_per_s),
        },
        "model": model,
        "world_size": world_size,
    }
    if answer.logprobs is not None:
        value["logprobs"] = [
            {
                "id": chosen.id,
                "token": chosen.text,
                "logprob": chosen.logprob,
                "top": [{"id": i, "token": t, "logprob": p} for i, t, p in chosen.top],
            }
            for chosen in answer.logprobs
        ]
    return json.dumps(value, ensure_ascii=False)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


@contextmanager
def _cursor_shown(console: "Console") -> Iterator[None]:
    """Always show the cursor at the end: Ctrl-C may come when only the cursor is hidden."""
    try:
        yield
    finally:
        console.show_cursor()


@contextmanager
def loading_bar(*, quiet: bool) -> Iterator[OnLoading]:
    """Show a line per node on stderr while weights load, and report ranks that stall.

    Without a terminal there are no bars; in quiet mode there is nothing at all.
    """
    if quiet:
        yield lambda loading: None
        return
    if not is_fancy(sys.stderr):

        def only_notices(loading: Loading) -> None:
            if loading.notice:
                note(f"mistral-chat: {loading.notice}")

        yield only_notices
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    columns = byte_columns("{task.description}")
    console = Console(stderr=True)
    with _cursor_shown(console), Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[int, TaskID] = {}

        def show(loading: Loading) -> None:
            if loading.node not in tasks:
                name = "loading" if loading.n_nodes == 1 else f"loading, node {loading.node}"
                tasks[loading.node] = progress.add_task(name, total=None)
            task = tasks[loading.node]
            progress.update(task, completed=loading.read, total=loading.total or None)
            if loading.notice:
                notice = clean(f"mistral-chat: {loading.notice}")
                progress.console.print(notice, highlight=False, markup=False)

        with drawn(progress.stop):
            yield show
