"""What each version of the chat template knows: the one place that tells versions apart.

mistral-common writes the templates; this says what the program itself must know of them, to read
answers and to refuse what a version cannot say. Imports nothing heavy, so that a flag can be
checked against a model's folder before ranks are started.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_chat.errors import PromptError, TokenizerError
from mistral_chat.files import read_json_object

__all__ = [
    "ARGS",
    "BEGIN_THINK",
    "CALL_ID",
    "END_THINK",
    "TEMPLATES",
    "TOOL_CALLS",
    "Template",
    "check_effort",
    "check_effort_of_file",
]

TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
BEGIN_THINK, END_THINK = "[THINK]", "[/THINK]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What a version knows beyond system prompt, questions and answers.

    Args:
        call_marks: the control tokens of a call, as models write them; none without calls.
            [TOOL_CALLS] alone is followed by a JSON list of all calls. With [ARGS] each call has
            its own: `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}` or `[TOOL_CALLS]name[ARGS]{...}`.
        calls_have_ids: a call's tokens hold its id, nine letters and digits. Otherwise the program
            makes an id up, which the template never writes.
        calls_have_text: an answer may hold text and calls.
        thinking: earlier answers are given back with their thinking, between [THINK] and [/THINK].
        system_thinking: a system prompt may show between these marks how to think.
        settings: a tokenizer may have [MODEL_SETTINGS], such as the reasoning effort.
    """

    call_marks: tuple[str, ...] = ()
    calls_have_ids: bool = False
    calls_have_text: bool = False
    thinking: bool = False
    system_thinking: bool = False
    settings: bool = False


_NAMED = (TOOL_CALLS, ARGS)
TEMPLATES = {
    "v1": Template(),
    "v2": Template(call_marks=(TOOL_CALLS,)),
    "v3": Template(call_marks=(TOOL_CALLS,), calls_have_ids=True),
    "v7": Template(call_marks=(TOOL_CALLS,), calls_have_ids=True, calls_have_text=True),
    "v11": Template(call_marks=(*_NAMED, CALL_ID), calls_have_ids=True, calls_have_text=True),
    "v13": Template(
        call_marks=_NAMED, calls_have_text=True, thinking=True, system_thinking=True
    ),
    "v15": Template(call_marks=_NAMED, calls_have_text=True, thinking=True, settings=True),
}  # fmt: skip


def check_effort(effort: str, known: Sequence[str], where: str, name: str = "reasoning") -> None:
    """Refuse a reasoning effort that a tokenizer does not know.

    Args:
        effort: none or high.
        known: the efforts that it knows; none in templates before v15.
        where: what the error calls the tokenizer or its template.
        name: what the error calls the setting.

    Raises:
        PromptError: it is not one of them.
    """
    asked = f"{name} {effort}".strip()
    if not known:
        raise PromptError(
            f"{asked}: {where} has no such setting, which some tokenizers of v15 have: "
            f"leave it out (a system prompt can ask for thinking)"
        )
    if effort not in known:
        raise PromptError(f"{asked}: {where} knows {', '.join(known)}: expected one")


def check_effort_of_file(effort: str, tokenizer: Path | None) -> None:
    """Do the same for a tokenizer's file, before anything heavy is imported.

    Args:
        effort: none or high.
        tokenizer: the file; None is the one that stands in for dummy weights.

    Raises:
        PromptError: the tokenizer does not know the effort.
        TokenizerError: the file is not JSON.
    """
    known: Sequence[str] = ()
    if tokenizer is not None and tokenizer.suffix == ".json":
        value: object = read_json_object(tokenizer, TokenizerError)
        for name in ("model_settings_builder", "reasoning_effort", "values"):
            value = value.get(name) if isinstance(value, dict) else None
        known = [str(entry) for entry in value] if isinstance(value, list) else ()
    check_effort(effort, known, str(tokenizer or "the tokenizer for dummy weights"), "--reasoning")
