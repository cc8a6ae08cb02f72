"""Reads a tokenizer's file, after checking that it is safe to give to mistral-common.

mistral-common trusts the file: a huge count fills all memory, a bad pattern makes its library
panic. Knows nothing of folders, nor of how text becomes ids.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]  # what tiktoken reads patterns with, too
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import is_tekken

from mistral_chat.errors import TokenizerError, one_line, shown
from mistral_chat.files import read_small_file

__all__ = ["is_panic", "read_tokenizer"]

Mistral = MistralTokenizer[Any, Any, Any, Any, Any]

MOST_TOKENS = 1 << 22  # as many as a model may have
_COUNTS = ("num_vocab_tokens", "default_vocab_size", "default_num_special_tokens")
# Kinds of characters that a pattern may tell apart.
_PROBE = "Aa b\u00e9\u4e2d1 22\n\n  \t'll (x)=_\U0001f600\u0301.\r\n"
PROBE_S = 1.0


def read_tokenizer(path: Path) -> tuple[Mistral, str]:
    """Load mistral-common's tokenizer, and give it with a fingerprint of the file's content.

    Args:
        path: a tekken.json or a SentencePiece model of Mistral's.

    Raises:
        TokenizerError: the file cannot be read as one.
    """
    data = read_small_file(path, TokenizerError)
    try:
        if is_tekken(path):
            _check_tekken(path, data)
        tokenizer: Mistral = MistralTokenizer.from_file(path)
        # A file that cannot encode a word fails now instead of at the first prompt.
        tokenizer.instruct_tokenizer.tokenizer.encode(_PROBE, bos=True, eos=False)
    except TokenizerError:
        raise
    except BaseException as error:
        # mistral-common and its libraries raise bare AssertionErrors, KeyErrors and others.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        first_line = one_line((str(error) or type(error).__name__).splitlines()[0], 120)
        raise TokenizerError(
            f"{path}: not a tokenizer that mistral-common can read ({first_line})"
        ) from error
    return tokenizer, hashlib.sha256(data).hexdigest()[:16]


def is_panic(error: BaseException) -> bool:
    """Whether an error is the panic of a library written in Rust, which is no Exception."""
    return type(error).__name__ == "PanicException"


def _check_tekken(path: Path, data: bytes) -> None:
    """Refuse counts that would fill the memory, and patterns that match nothing or take forever."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise TokenizerError(f"{path} is nested too deeply: expected a tekken.json") from None
    config = value.get("config") if isinstance(value, dict) else None
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: config is {shown(config)}: expected an object")
    for name in _COUNTS:
        count = config.get(name, 0)
        if type(count) is not int or not 0 <= count <= MOST_TOKENS:
            raise TokenizerError(
                f"{path}: {name} is {shown(count)}: expected a whole number up to {MOST_TOKENS:,}"
            )
    size, n_special = (config.get(name, 0) for name in _COUNTS[1:])
    if size - n_special < 256:
        raise TokenizerError(
            f"{path}: default_vocab_size is {size}, default_num_special_tokens {n_special}: "
            f"expected room for 256 bytes beside these"
        )
    special = value.get("special_tokens") or []  # v1 to v7 may leave it out
    try:
        ranks = [entry["rank"] for entry in special]
        is_sound = all(type(rank) is int for rank in ranks)
        is_sound = is_sound and sorted(ranks) == list(range(len(ranks)))
    except (KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise TokenizerError(f"{path}: the ranks of special_tokens are not 0, 1, 2 and so on")
    pattern = config.get("pattern")
    if not isinstance(pattern, str):
        raise TokenizerError(f"{path}: pattern is {shown(pattern)}: expected a text")
    try:
        matches = regex.finditer(pattern, _PROBE, timeout=PROBE_S)
        is_sound = all(match.end() > match.start() for match in matches)
    except TimeoutError:
        is_sound = False
    except regex.error:  # tiktoken's own library may read it, or says what is wrong
        return
    if not is_sound:
        raise TokenizerError(
            f"{path}: the pattern {shown(pattern)} finds pieces of no letters, or none in time: "
            f"expected one that divides text into words"
        )
