"""Text to ids and back, through mistral-common, for every template version that it supports.

Encodes prompts and conversations, and decodes ids as they arrive. Knows nothing of weights,
sampling or terminals.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import SystemMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest, ReasoningEffort
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.tokens.tokenizers.base import Tokenizer as RawTokenizer
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from mistral_chat.chat.template import (
    ARGS,
    BEGIN_THINK,
    CALL_ID,
    END_THINK,
    TEMPLATES,
    TOOL_CALLS,
    check_effort,
)
from mistral_chat.chat.tokenizer_file import read_tokenizer
from mistral_chat.errors import PromptError, TokenizerError, one_line
from mistral_chat.model.folder import ModelFolder

__all__ = ["Detokenizer", "Tokenizer"]

_THINK_MARKS = (BEGIN_THINK, END_THINK)
_SPACE = "\u2581"  # SentencePiece's mark for a space
# Terminal input that is not UTF-8 arrives as lone surrogates; SentencePiece raises RuntimeError.
_NO_TEXT = "found half of a surrogate pair, which is no text: expected UTF-8"


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        path: a tekken.json or a SentencePiece model of Mistral's.
        end_ids: ids that end an answer, in addition to the tokenizer's own.

    `fingerprint` is the same for two files with the same content, `template` is what the template's
    version knows, and `efforts` are the reasoning efforts that can be asked for. Control tokens
    that the vocabulary lacks have the id None.

    Raises:
        TokenizerError: the file is not a tokenizer, or an end id is a token that begins part of an
            answer.
    """

    def __init__(self, path: Path, end_ids: Iterable[int] = ()) -> None:
        self.mistral, self.fingerprint = read_tokenizer(path)
        raw = self.mistral.instruct_tokenizer.tokenizer
        assert isinstance(raw, (Tekkenizer, SentencePieceTokenizer))
        self.raw: Tekkenizer | SentencePieceTokenizer = raw
        self.eos_id = int(raw.eos_id)
        self.template = TEMPLATES[self.mistral.version.value]
        self.tool_calls_id = _special_id(raw, TOOL_CALLS)
        self.args_id, self.call_id_id = _special_id(raw, ARGS), _special_id(raw, CALL_ID)
        self.begin_think_id, self.end_think_id = (_special_id(raw, mark) for mark in _THINK_MARKS)
        # Control tokens that models write themselves: the parts of a call, marks of thinking.
        marks = {
            mark: _special_id(raw, mark) for mark in (*self.template.call_marks, *_THINK_MARKS)
        }
        self._written = {id_: mark for mark, id_ in marks.items() if id_ is not None}
        settings = raw.model_settings_builder
        effort = settings.reasoning_effort if settings is not None else None
        self.efforts = () if effort is None else tuple(map(str, effort.values))
        self.end_ids = frozenset((self.eos_id, *end_ids))
        for id_ in self.end_ids & self._written.keys():
            raise TokenizerError(
                f"{path}: the end token {id_} of config.json or generation_config.json is "
                f"{self._written[id_]}, which begins a part of an answer: expected another id"
            )

    @classmethod
    def shipped(cls, vocab_size: int) -> "Tokenizer":
        """Return mistral-common's v3 tokenizer of this vocabulary size, for dummy weights.

        Raises:
            TokenizerError: no tokenizer of that size is shipped.
        """
        for is_tekken_file in (False, True):
            path = MistralTokenizer.v3(is_tekken=is_tekken_file).instruct_tokenizer.tokenizer
            tokenizer = cls(path.file_path)
            if tokenizer.n_words == vocab_size:
                return tokenizer
        raise TokenizerError(
            f"no tokenizer with {vocab_size} entries is shipped: expected a vocab_size of 32768 "
            f"or 131072 with dummy weights, or a MODEL folder with a tokenizer"
        )

    @classmethod
    def from_folder(cls, folder: ModelFolder) -> "Tokenizer":
        """The tokenizer of a model folder; for dummy weights the shipped one of the same size.

        Raises:
            TokenizerError: there is none or more than one, or it cannot be read, its name does not
                tell its template, or it belongs to another model.
        """
        path, vocab_size = folder.tokenizer_file, folder.args.vocab_size
        if path is None:
            return cls.shipped(vocab_size)
        tokenizer = cls(path, folder.end_ids)
        if tokenizer.n_words > vocab_size:
            raise TokenizerError(
                f"{path} has {tokenizer.n_words:,} tokens, the model {vocab_size:,}: expected the "
                f"tokenizer of this model"
            )
        if path.name == "tokenizer.model" and tokenizer.tool_calls_id is not None:
            # mistral-common would take it for v1, whose vocabulary has no [TOOL_CALLS].
            raise TokenizerError(
                f"{path}: a vocabulary of v2 or v3 under a name without version: expected "
                f"tokenizer.model.v3 (Mistral's models since May 2024) or tokenizer.model.v2; "
                f"rename it"
            )
        return tokenizer

    @property
    def n_words(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return self.raw.n_words

    @property
    def version(self) -> str:
        """Template version and kind, such as `v3 SentencePiece`."""
        kind = "Tekken" if isinstance(self.raw, Tekkenizer) else "SentencePiece"
        return f"{self.mistral.version.value} {kind}"

    def banned_ids(self, vocab_size: int, *, tools: bool) -> tuple[int, ...]:
        """Return ids that must never be in an answer.

        These are control tokens, except those that models write themselves; the tool call token if
        no tools are offered; and ids of the model that the tokenizer does not have.

        Args:
            vocab_size: the model's vocabulary size.
            tools: whether tools are offered.
        """
        allowed = {id_ for id_, text in self._written.items() if tools or text in _THINK_MARKS}
        banned = {id_ for id_ in self.raw.special_ids if id_ not in allowed}
        if isinstance(self.raw, SentencePieceTokenizer):
            banned.add(self.raw._model.unk_id())
        banned.update(range(self.n_words, vocab_size))
        return tuple(sorted(i for i in banned - self.end_ids if i < vocab_size))

    def encode(self, text: str) -> list[int]:
        """Encode a plain prompt, with the beginning-of-sequence token.

        Raises:
            PromptError: the text contains a lone surrogate.
        """
        try:
            return self.raw.encode(text, bos=True, eos=False)
        except RuntimeError as error:
            raise PromptError(_NO_TEXT) from error

    def encode_conversation(
        self, messages: Sequence[Any], tools: Sequence[Tool] = (), reasoning: str | None = None
    ) -> list[int]:
        """Encode messages with the model's template.

        Args:
            messages: mistral-common's.
            tools: functions offered to the model.
            reasoning: effort; None leaves it to the model.

        Raises:
            PromptError: the template does not know the effort, or refuses the conversation.
        """
        if reasoning is not None:
            self.check_effort(reasoning)
        effort = None if reasoning is None else ReasoningEffort(reasoning)
        request: ChatCompletionRequest[Any] = ChatCompletionRequest(
            messages=list(messages), tools=list(tools) or None, reasoning_effort=effort
        )
        return self.encode_chat(request)

    def system_message(self, text: str) -> SystemMessage:
        """Return a system prompt as the template takes it.

        Where a template may show in it how to think, the text's first [THINK]...[/THINK] becomes
        these control tokens, as in Mistral's instructions for SYSTEM_PROMPT.txt.
        """
        before, begin, rest = text.partition(BEGIN_THINK)
        pattern, end, after = rest.partition(END_THINK)
        if not (self.takes_system_thinking and begin and end):
            return SystemMessage(content=text)
        parts = (TextChunk(text=before), ThinkChunk(thinking=pattern), TextChunk(text=after))
        return SystemMessage(content=[part for part in parts if part != TextChunk(text="")])

    def encode_chat(self, request: ChatCompletionRequest[Any]) -> list[int]:
        """Encode a conversation with the model's template.

        Raises:
            PromptError: mistral-common refuses the conversation, or SentencePiece its text.
        """
        try:
            return list(self.mistral.encode_chat_completion(request).tokens)
        except (MistralCommonException, ValueError, AssertionError, RecursionError,
                LookupError, TypeError) as error:  # fmt: skip
            first_line = one_line((str(error) or type(error).__name__).splitlines()[0], 160)
            raise PromptError(
                f"the {self.version} template refuses this conversation: {first_line}"
            ) from error
        except RuntimeError as error:
            raise PromptError(_NO_TEXT) from error

    def is_special(self, token: int) -> bool:
        """Return whether an id is a control token."""
        return token < self.n_words and self.raw.is_special(token)

    def is_written(self, token: int) -> bool:
        """Return whether a control token is one that models write themselves."""
        return token in self._written

    @property
    def takes_thinking(self) -> bool:
        """Whether the template can encode the thinking of earlier answers."""
        return self.template.thinking and self.has_think_marks

    @property
    def takes_system_thinking(self) -> bool:
        """Whether a system prompt may show how to think."""
        return self.template.system_thinking and self.has_think_marks

    @property
    def has_think_marks(self) -> bool:
        """Whether a model can mark what it thinks, whatever the template says of that."""
        return self.begin_think_id is not None and self.end_think_id is not None

    def ends_within_thinking(self, ids: Sequence[int]) -> bool:
        """Return whether a prompt ends after [THINK], so that the answer begins with thinking."""
        last = next((token for token in reversed(ids) if self.is_special(token)), None)
        return last is not None and last == self.begin_think_id

    def check_effort(self, effort: str, name: str = "reasoning") -> None:
        """Refuse a reasoning effort that this tokenizer does not know.

        Args:
            effort: none or high.
            name: what the error calls the setting.

        Raises:
            PromptError: it does not know it.
        """
        check_effort(effort, self.efforts, f"the {self.version} template", name)

    def begins_with_mark(self, token: int) -> bool:
        """Return whether a SentencePiece token starts with the mark for a space, not the byte."""
        return (
            isinstance(self.raw, SentencePieceTokenizer)
            and token < self.n_words
            and self.raw.id_to_piece(token).startswith(_SPACE)
        )

    def piece(self, token: int) -> str:
        """Return one token as text, to show it alone; part of a character shows as U+FFFD."""
        if self.is_special(token):
            return self.raw.id_to_piece(token)
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return a token's bytes; empty for control tokens that no model writes."""
        if token >= self.n_words:
            return b""
        if self.raw.is_special(token):
            return self._written.get(token, "").encode()
        if isinstance(self.raw, Tekkenizer):
            return self.raw.id_to_byte_piece(token)
        piece = self.raw.id_to_piece(token)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes([int(byte[1], 16)])
        if token == self.raw._model.unk_id():
            return " \u2047 ".encode()  # as SentencePiece decodes it
        return piece.replace(_SPACE, " ").encode()

    def detokenizer(self, *, continues: bool) -> "Detokenizer":
        """Return a decoder that turns ids into text as they arrive.

        Args:
            continues: whether the text continues a prompt, so that a leading space is part of it.
                Otherwise SentencePiece's leading space is dropped.
        """
        strips = isinstance(self.raw, SentencePieceTokenizer) and not continues
        return Detokenizer(self, strip_first_space=strips)


class _Bytes(Protocol):
    def token_bytes(self, token: int) -> bytes: ...

    def is_special(self, token: int) -> bool: ...

    def begins_with_mark(self, token: int) -> bool: ...


class Detokenizer:
    """Decode incrementally, without splitting characters or losing spaces.

    The pieces together equal the text of all ids decoded at once. Invalid UTF-8 becomes U+FFFD.

    Args:
        tokenizer: provides each token's bytes.
        strip_first_space: whether to drop the mark for a space at the very beginning.
    """

    def __init__(self, tokenizer: _Bytes, *, strip_first_space: bool) -> None:
        self._tokenizer = tokenizer
        self._strip = strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Return the text that this token completes; may be empty."""
        if self._tokenizer.is_special(token):  # it ends any unfinished character before it
            text = self._decoder.decode(b"", final=True)
            self._decoder.reset()
            return text + self._tokenizer.token_bytes(token).decode()
        data = self._tokenizer.token_bytes(token)
        if self._strip and self._tokenizer.begins_with_mark(token):
            data = data.removeprefix(b" ")
        self._strip = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return the rest: U+FFFD for an unfinished character."""
        return self._decoder.decode(b"", final=True)


def _special_id(raw: RawTokenizer, text: str) -> int | None:
    """Return the id of a control token, or None if the tokenizer does not have it."""
    try:
        id_ = int(raw.get_special_token(text))
    except ValueError:
        return None
    return id_ if raw.is_special(id_) else None
