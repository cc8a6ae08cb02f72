"""The tokenizers that mistral-common ships, and small ones made from its Tekken file.

It ships none of v11 to v15; those differ from the Tekken file in their control tokens and settings.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from mistral_common.tokens.tokenizers.base import SpecialTokens
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from mistral_chat.chat.tokenizer import Tokenizer

SENTENCEPIECE = ("v1", "v2", "v3", "v7")
# The shipped "tekken" has 131,072 words and takes seconds to load; these have few of them.
TEKKEN = ("small tekken", "small tekken v7", "v11", "v13", "v15")
WITH_MARKS = ("v2", "v3", "v7", *TEKKEN)  # templates of tokens
THINKING = ("v13", "v15")  # templates that give thinking back
N_SMALL = 4000


@cache
def shipped_file(name: str) -> Path:
    """A tokenizer file of mistral-common."""
    if name == "tekken":  # to make it only to ask for its file would take seconds
        return MistralTokenizer._data_path() / "tekken_240718.json"
    makers = {"v1": MistralTokenizer.v1, "v2": MistralTokenizer.v2, "v3": MistralTokenizer.v3,
              "v7": MistralTokenizer.v7}  # fmt: skip
    made: MistralTokenizer[Any, Any, Any, Any, Any] = makers[name]()
    return Path(made.instruct_tokenizer.tokenizer.file_path)


@cache
def small_tekken(version: str) -> str:
    """Text of a tekken.json with few words and the control tokens and settings of a version."""
    names = [SpecialTokens(t["token_str"]).value for t in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    if version in ("v11", "v13", "v15"):
        names += ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]
    if version == "v15":
        names += ["[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"]
    data = json.loads(shipped_file("tekken").read_text(encoding="utf-8"))
    data["vocab"] = data["vocab"][:N_SMALL]
    data["config"] |= {
        "num_vocab_tokens": N_SMALL,
        "default_vocab_size": N_SMALL + 100,
        "default_num_special_tokens": 100,
        "version": version,
    }
    data["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
    ]
    if version == "v15":
        effort = {"type": "enum", "values": ["none", "high"], "accepts_none": True,
                  "default": "none"}  # fmt: skip
        data["model_settings_builder"] = {"reasoning_effort": effort}
    return json.dumps(data)


@cache
def tokenizer(name: str) -> Tokenizer:
    versions = {"small tekken": "v3", "small tekken v7": "v7", "v11": "v11", "v13": "v13",
                "v15": "v15"}  # fmt: skip
    if name not in versions:
        return Tokenizer(shipped_file(name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tekken.json"
        path.write_text(small_tekken(versions[name]), encoding="utf-8")
        return Tokenizer(path)


def encode(made: Tokenizer, text: str) -> list[int]:
    """Plain text without any mark."""
    return made.raw.encode(text, bos=False, eos=False)


def byte_ids(made: Tokenizer, text: str) -> list[int]:
    """The same text in the most tokens that it can have: one a byte."""
    if isinstance(made.raw, Tekkenizer):
        return [made.raw.num_special_tokens + byte for byte in text.encode()]
    return [made.raw.vocab().index(f"<0x{byte:02X}>") for byte in text.encode()]
