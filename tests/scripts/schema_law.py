"""The law of answers kept to a schema: what ends by itself is valid, and what is valid may be said.

    python -m tests.scripts.schema_law [N] [SEED]

draws N random schemas of each kind, walks over their masks, has jsonschema judge what ended, and
prints counts. Needs neither a model nor a tokenizer: words are bytes and some longer ones.
"""

import json
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache, lru_cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from jsonschema import FormatChecker
from jsonschema.validators import Draft202012Validator, validator_for
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from mistral_chat.chat.schema.schema_grammar import compile_schema
from mistral_chat.errors import PromptError

Schema = dict[str, Any]

LONGER = (
    *('": ', '", ', '"}', '\\"', "\\\\", '{"', "\\n", "\\u00", "00", "000", ".0", "-0", "ab", "é"),
    *(
        "😀",
        "0.",
        "2023-",
        "-02-",
        "-29",
        ":60",
        "T00:00:",
        "\u2028",
        "\x7f",
        "k",
        '"k"',
        '"k\\n"',
        ",\n",
    ),
)
END = 256 + len(LONGER)


class _Bytes(TokenizerWrapper):
    def __init__(self) -> None:
        self.is_tokenizer_wrapper = True
        self.bos_token_id = None
        self.eos_token_id = END
        self.special_token_ids = [END]
        self.tokens = [bytes((n,)) for n in range(256)] + [word.encode() for word in LONGER] + [b""]

    def __call__(self, s: str) -> list[int]:
        raise AssertionError(s)


@cache
def _words() -> LLTokenizer:
    return LLTokenizer(_Bytes())


TOKENS = _Bytes().tokens
LIKED = {
    "quotes": b'"\\nrtbfu0',
    "digits": b"0123456789.-+eE",
    "ends": b'"}],:{[',
    "nines": b"09.",
    "letters": b"abkxyz _-/@:.",
}


def _is_hot(token: bytes, liked: bytes) -> bool:
    return bool(token) and all(byte in liked for byte in token)


HOT = {
    name: np.array([_is_hot(token, liked) for token in TOKENS], dtype=bool)
    for name, liked in LIKED.items()
}


class StuckError(AssertionError):
    """A place in a schema where no text goes on."""


def allowed(matcher: LLMatcher) -> Any:
    words = np.frombuffer(bytes(matcher.compute_bitmask()), dtype=np.uint8)
    if matcher.is_error():
        raise StuckError(matcher.get_error().splitlines()[0])
    bits = np.unpackbits(words, bitorder="little")[: END + 1].astype(bool)
    if not bits.any():
        raise StuckError("no text goes on")
    return bits


def walk(lark: str, rng: random.Random, most: int = 120) -> bytes | None:
    """A random answer, or None if it did not end in so many words."""
    matcher = LLMatcher(_words(), lark, log_level=0)
    text = b""
    like = rng.choice([None, *LIKED])
    for step in range(most):
        bits = allowed(matcher)
        if bits[END] and (rng.random() < 0.5 or step > 40):
            return text
        hot = None
        if step > 40:
            hot = bits & HOT["ends"]
        elif like and rng.random() < 0.7:
            hot = bits & HOT[like]
        elif rng.random() < 0.2:
            hot = bits & HOT["ends"]
        chosen = np.flatnonzero(bits if hot is None or not hot.any() else hot)
        if len(chosen) > 1 and chosen[-1] == END:
            chosen = chosen[:-1]
        token = int(rng.choice(chosen))
        if token == END:
            return text
        text += TOKENS[token]
        if not matcher.consume_token(token):
            raise StuckError(matcher.get_error().splitlines()[0])
    return None


@lru_cache(maxsize=4)
def _matcher(lark: str) -> LLMatcher:
    return LLMatcher(_words(), lark, log_level=0)


def takes(lark: str, text: str) -> bool:
    """Whether an answer may be this text."""
    matcher = _matcher(lark)
    matcher.reset()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and bool(matcher.is_accepting())


# The judge: jsonschema, and the formats that it looks at only with packages that are not here.
JUDGE = FormatChecker()
_HOST = re.compile(
    r"(?=.{1,253}\Z)(?!-)[a-zA-Z0-9-]{1,63}(?<!-)(\.(?!-)[a-zA-Z0-9-]{1,63}(?<!-))*\Z"
)
_URI = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*\Z")


@JUDGE.checks("date-time", raises=ValueError)
def _is_moment(text: object) -> bool:
    if not isinstance(text, str):
        return True
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", text, re.ASCII):
        return False
    return datetime.fromisoformat(text).tzinfo is not None


@JUDGE.checks("duration")
def _is_duration(text: object) -> bool:
    if not isinstance(text, str):
        return True
    found = re.fullmatch(
        r"P(?:\d+W|(?=.)(\d+Y)?(\d+M)?(\d+D)?(?:T(?=.)(\d+H)?(\d+M)?(\d+S)?)?)", text, re.ASCII
    )
    if found is None:
        return False
    years, months, days, hours, minutes, seconds = (bool(part) for part in found.groups())
    return not ((years and days and not months) or (hours and seconds and not minutes))


@JUDGE.checks("hostname")
def _is_host(text: object) -> bool:
    return not isinstance(text, str) or _HOST.match(text) is not None


@JUDGE.checks("email")
def _is_email(text: object) -> bool:
    if not isinstance(text, str):
        return True
    local, _, domain = text.rpartition("@")
    return 0 < len(local) <= 64 and len(text) <= 254 and "." in domain and _is_host(domain)


def _parts(text: str) -> tuple[str, str]:
    if not _URI.match(text):
        raise ValueError(text)
    split = urlsplit(text)
    assert split.port is None or split.port >= 0
    return split.scheme, split.netloc


@JUDGE.checks("uri", raises=ValueError)
def _is_uri(text: object) -> bool:
    return not isinstance(text, str) or bool(_parts(text)[0])


@JUDGE.checks("uri-reference", raises=ValueError)
def _is_reference(text: object) -> bool:
    return not isinstance(text, str) or bool(_parts(text))


@JUDGE.checks("json-pointer")
def _is_pointer(text: object) -> bool:
    return not isinstance(text, str) or not re.search(r"^[^/]|~(?![01])", text)


def faults(answer: bytes | str, schema: Mapping[str, Any]) -> str | None:
    """What is wrong with an answer."""
    try:
        value = json.loads(answer)
    except ValueError as error:
        return str(error)
    kind = validator_for(schema, default=Draft202012Validator)
    error = next(iter(kind(schema, format_checker=JUDGE).iter_errors(value)), None)
    return None if error is None else error.message


# Random schemas, each of a kind.
_ITEMS = r"""
" \\ < > / : * ? | a-z A-F 0-9 \s \d \w \S \D \W \x00-\x1f \n \r \t ' é \u0022 \x5c \x7f \] \-
. \x00-\x20 !-[ ]-~ \u2028 \b \x0b 😀-😎
"""
ITEMS = (*_ITEMS.split(), " ", " -~")
_KNOWN = r"""
[^"] [^\\] [^<>"] [^\\/:*?"<>|] [\x00-\x1f] [^"\n] [^"\\] [^/] [^\x00-\x1f] [\s\S] [^\s"]
[^\r\n"] \S . [^'"] \D \W [\x00-!#-\[\]-~] [^\x5c] [^\u0022] [^"a-z] ["] [\\] \\ " [^,"]
[^;\\] [^{}"] [^\w] [^\d] [^\W\d] [^\t] [\n"]
"""
KNOWN = (*_KNOWN.split(),)
REPEATS = ("", "", "*", "+", "?", "{2}", "{1,5}", "{0,3}", "{2,}", "*?")


def draw_pattern(rng: random.Random, depth: int = 2) -> str:
    kind = rng.random()
    if depth and kind < 0.35:
        made = "".join(draw_pattern(rng, depth - 1) for _ in range(rng.randrange(1, 4)))
    elif depth and kind < 0.5:
        options = "|".join(draw_pattern(rng, depth - 1) for _ in range(rng.randrange(1, 4)))
        # a group without a most that holds one would keep Python's `re`, the judge, for ever
        repeat = rng.choice(("", "?", "{2}", "{0,3}"))
        made = f"({'?:' * rng.randrange(2)}{options}){repeat}"
    elif kind < 0.7:
        made = rng.choice(KNOWN) + rng.choice(REPEATS)
    elif kind < 0.9:
        items = "".join(rng.choice(ITEMS) for _ in range(rng.randrange(1, 5)))
        made = f"[{'^' * rng.randrange(2)}{items}]{rng.choice(REPEATS)}"
    else:
        made = rng.choice(["a", "k", "\\.", "\\/", '\\"', "x-", "{", "é", "\\u0041", "0"])
    return made


def draw_text(rng: random.Random) -> Schema:
    pattern = draw_pattern(rng)
    if rng.random() < 0.7:
        pattern = "^" * (rng.random() < 0.9) + pattern + "$" * (rng.random() < 0.9)
    made: Schema = {"type": "string", "pattern": pattern}
    if rng.random() < 0.3:
        made |= {"minLength": rng.randrange(4), "maxLength": rng.randrange(4, 20)}
    return made


NAMES = ("k", "a", "b", "n", "aa", "x-1", "größe", 'q"', "\\", "k\n", "0", "x y", "", "é")
_KEYS = r"""
^k$ ^(a|b)$ ^[ab]$ ^a{1,2}$ k ^x- \d$ ^\w+$ ^[^"]+$ ^[^\\]{1,4}$ ^.$ ^.*$ ^\S+$ ^[a-z]{1,3}$
^(k|n)$ ^x-|^y- ^[^k]+$ ^"$ ^é$ ^(^k|n)$ ^\W$ ^k\n?$ ^[\x00-\x1f]$ ^x?$
"""
KEYS = (*_KEYS.split(), "")


def draw_names(rng: random.Random) -> Schema:
    made: Schema = {"type": "object"}
    small: list[Any] = [
        {"type": "integer"},
        {"enum": ["x", 'y"']},
        {"type": "boolean"},
        True,
        False,
    ]
    keys = rng.sample(KEYS, rng.choice([1, 1, 1, 2]))
    made["patternProperties"] = {key: rng.choice(small) for key in keys}
    names = rng.sample(NAMES, rng.randrange(4))
    if names and rng.random() < 0.7:
        made["properties"] = {name: rng.choice(small) for name in names}
    if rng.random() < 0.6:
        made["required"] = rng.sample(NAMES[:6], rng.randrange(3))
    extra = rng.choice([None, False, False, True, {"type": "null"}])
    if extra is not None:
        made["additionalProperties"] = extra
    if rng.random() < 0.1:
        made["minProperties"] = 1
    return made


EDGES = (
    0,
    0.5,
    1,
    -0.5,
    -1,
    2,
    0.25,
    -0.25,
    10,
    9.5,
    -10,
    0.1,
    0.3,
    1.5,
    -1.5,
    100,
    99,
    -0.0,
    1e-7,
    1e-9,
    7,
)


def draw_bounds(rng: random.Random) -> Schema:
    made: Schema = {"type": rng.choice(["number", "integer", "number", ["integer", "null"]])}
    for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        if rng.random() < 0.5:
            low = rng.choice(EDGES)
            made[name] = low + (rng.choice([0, 0.5, 1, 3]) if "Max" in name or "max" in name else 0)
    if rng.random() < 0.2:
        made["multipleOf"] = rng.choice([2, 5, 7, 0.5, 0.25, 0.1, 0.01, 10, 1.5, 3.0])
    return made


_FORMAT_NAMES = r"""
date date-time time duration email idn-email hostname idn-hostname ipv4 ipv6 uuid uri iri
uri-reference iri-reference uri-template json-pointer relative-json-pointer regex binary
password path file-path json-string ipv4network x
"""
FORMAT_NAMES = (*_FORMAT_NAMES.split(),)


def draw_format(rng: random.Random) -> Schema:
    made: Schema = {"format": rng.choice(FORMAT_NAMES)}
    if rng.random() < 0.8:
        made["type"] = rng.choice(["string", "string", ["string", "null"], "integer"])
    if rng.random() < 0.1:
        made["pattern"] = rng.choice(["^2", "1", "^[^\\\\]*$", "a"])
    if rng.random() < 0.1:
        made["maxLength"] = rng.choice([3, 25, 300])
    return made


ODD = '"\\/\b\t\n\f\r\x00\x01\x1f\x7f\x80\u2028\ufeffé😀a{}% '


def _odd(rng: random.Random) -> str:
    return "".join(rng.choice(ODD) for _ in range(rng.randrange(1, 5)))


def draw_constant(rng: random.Random) -> Schema:
    values: list[Any] = [_odd(rng) for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.3:
        values.append(
            rng.choice([-0.0, 0.1, 1e-7, 3, None, True, {_odd(rng): _odd(rng)}, [_odd(rng)], 1.0])
        )
    return {"const": values[-1]} if rng.random() < 0.4 else {"enum": values}


def draw_mixed(rng: random.Random) -> Schema:
    """The other kinds, one within the other."""

    def inner() -> Schema:
        return rng.choice([*KINDS.values()][:-1])(rng)

    kind = rng.randrange(6)
    if kind == 0:
        return {"type": "array", "items": inner(), "minItems": 1, "maxItems": 2}
    if kind == 1:
        return {"anyOf": [inner(), inner()]}
    if kind == 2:
        return {"allOf": [inner(), inner()]}
    if kind == 3:
        names = rng.sample(NAMES, 2)
        return {
            "type": "object",
            "properties": {name: inner() for name in names},
            "required": names[:1],
            "additionalProperties": rng.choice([False, False, True]),
        }
    if kind == 4:
        return {"$ref": "#/components/a", "components": {"a": inner()}}
    draft4 = draw_bounds(rng)
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if name in draft4:
            draft4[name] = rng.random() < 0.7
            draft4.setdefault(name.replace("exclusiveM", "m"), 3)
    return draft4 | {"$schema": "http://json-schema.org/draft-04/schema#"}


KINDS: dict[str, Callable[[random.Random], Schema]] = {
    "texts": draw_text,
    "names": draw_names,
    "bounds": draw_bounds,
    "formats": draw_format,
    "constants": draw_constant,
    "mixed": draw_mixed,
}


class Law:
    """Counts of what was tried of one kind.

    Args:
        kind: of schemas.
        seed: of schemas and walks.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        self._rng = random.Random(f"{kind} {seed}")
        self.n = Counter[str]()
        self.refused = Counter[str]()
        self.broken: list[str] = []

    def try_schema(self, walks: int = 4) -> None:
        """Draw one, walk, judge."""
        schema = KINDS[self._kind](self._rng)
        self.n["schemas"] += 1
        try:
            lark = compile_schema(schema)
        except PromptError as error:
            self.n["refused"] += 1
            reason = str(error).partition("schema: ")[2]
            self.refused[re.sub(r"'[^']*'|\"[^\"]*\"|[\d.e-]{2,}|\d", "_", reason)[:90]] += 1
            return
        for _ in range(walks):
            try:
                answer = walk(lark, self._rng)
            except StuckError as error:
                if "too many expressions" in str(error) or "too complex" in str(error):
                    self.n["too much to follow"] += 1  # an error by name, and no answer
                    return
                self.broken.append(f"{json.dumps(schema)}: {error}")
                return
            self.n["answers" if answer is not None else "not ended"] += 1
            wrong = faults(answer, schema) if answer is not None else None
            if wrong is not None:
                self.broken.append(f"{json.dumps(schema)}: {answer!r}: {wrong}")


def main() -> None:
    n, seed = (int(text) for text in (sys.argv[1:] + ["2000", "0"][len(sys.argv) - 1 :])[:2])
    warnings.simplefilter("ignore")
    for kind in KINDS:
        law = Law(kind, seed)
        for _ in range(n):
            law.try_schema()
        print(kind, dict(law.n), "broken:", len(law.broken), flush=True)
        for reason, count in law.refused.most_common(12):
            print(f"    refused {count}: {reason}")
        for line in law.broken[:6]:
            print("    BROKEN", line[:400])


if __name__ == "__main__":
    main()
