"""Model folders with a fault or two, drawn from a seed: each is an answer or one short line.

`python -m tests.model.fuzz_folders --n 5000` draws many; `make test` runs a few hundred. A case is
its number alone, so that `--first N --n 1` repeats it.
"""

import argparse
import base64
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mistral_chat.chat.llm import LLM
from mistral_chat.cli.inspect import run as inspect
from mistral_chat.config import EngineConfig, LoadFormat, SamplingParams
from mistral_chat.errors import MistralChatError, one_line
from mistral_chat.model.args import TransformerArgs
from tests.conftest import random_weights, shipped_tokenizer, write_params
from tests.model.test_hf import config_of, their_state

LIMIT_S = 60  # for a case that takes 0.02 s alone: CI is slow, and a table of 10^7 layers slower
MOST_BYTES = 2 << 30  # that all cases together may add to this process
MOST_CHARACTERS, LEAST_CHARACTERS = 300, 20
SPARSE_BYTES = 1 << 40
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ESCAPE = "\x1b]0;owned\x07"
SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
           "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
           "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
           "[TOOL_CONTENT]")  # fmt: skip
LONG_TOKENS = (b"he", b"hel", b"hello")
ARGS = TransformerArgs(
    dim=16,
    n_layers=2,
    head_dim=8,
    hidden_dim=24,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=len(SPECIAL) + 256 + len(LONG_TOKENS),
    rope_theta=1e4,
    max_seq_len=64,
)
WIDE_ARGS = TransformerArgs(**asdict(ARGS) | {"vocab_size": 32768})  # for a real SentencePiece file

# What a value may become. A `_Raw` is written as it stands.


class _Raw(str):
    """JSON text that no value of Python's gives."""


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2.0, 0.5, -0.5, 1e-300, 1e30, 1e300, 10**7, 2**31, 2**32,
    2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**29, "", "x", "16", ESCAPE, "n" * 5000, "../../etc",
    "/etc/passwd", "\0", [], {}, [None], [2, 3], [[2]], {"a": 1}, [1] * 1000, [None] * 100_000,
    _Raw("NaN"), _Raw("Infinity"), _Raw("-Infinity"), _Raw("1e999"), _Raw("9" * 4000),
    _Raw("-" + "9" * 4000), _Raw("0." + "1" * 4000), _Raw("[" * 100_000 + "]" * 100_000),
    _Raw('{"a":' * 50_000 + "1" + "}" * 50_000), _Raw('"\\ud800"'), _Raw('{"a": 1, "a": 2}'),
    _Raw("tru"), _Raw("01"),
)  # fmt: skip
EXTRA_KEYS: tuple[tuple[str, Any], ...] = (
    ("moe", None), ("moe", {"num_experts": 8}), ("lora", {"enable": False}),
    ("lora", {"enable": True, "rank": 2}), ("sliding_window", 8), ("_sliding_window", [8, None]),
    ("tied_embeddings", True), ("eos_token_id", [2, 277]), ("eos_token_id", 9), (ESCAPE, 1),
    ("n" * 5000, 1), ("rope_scaling", {"type": "yarn"}), ("head_dim", 8), ("model_type", "mamba"),
    ("max_batch_size", 10**9), ("quantization_config", {}), ("rope_theta", None),
    ("yarn", {"original_max_position_embeddings": 4, "factor": 2}),
    ("llama_4_scaling", {"original_max_position_embeddings": 4, "beta": 0.1}),
    ("quantization", {"qformat_weight": "fp8_e4m3"}), ("vision_encoder", {"hidden_size": 8}),
    ("quantization_config", {"quant_method": "awq", "bits": 4}), ("text_config", {"dim": 1}),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2, "rope_theta": 1e4,
                         "original_max_position_embeddings": 4}),
)  # fmt: skip
NAMES = ("consolidated-00001-of-00002.safetensors", "consolidated.01.pth", "tekken2.json",
         "tokenizer.model", "model.safetensors", "params.json", "config.json",
         "consolidated.safetensors.index.json", "consolidated-1-of-99999999.safetensors",
         "generation_config.json")  # fmt: skip


def tekken() -> dict[str, Any]:
    """A tokenizer of a few hundred tokens, with every control token of v3."""
    vocab = [bytes([byte]) for byte in range(256)] + list(LONG_TOKENS)
    return {
        "config": {
            "pattern": r"\S+|\s+",
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": len(vocab) + len(SPECIAL),
            "default_num_special_tokens": len(SPECIAL),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(data).decode(), "token_str": None}
            for rank, data in enumerate(vocab)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True}
            for rank, name in enumerate(SPECIAL)
        ],
        "version": 1,
        "type": "Tekken",
    }


def make_bases(folder: Path) -> list[Path]:
    """Sound folders of each kind."""
    bases = []

    def begin(name: str, args: TransformerArgs = ARGS) -> tuple[Path, dict[str, torch.Tensor]]:
        base = folder / name
        base.mkdir(parents=True)
        bases.append(base)
        if args is ARGS:
            (base / "tekken.json").write_text(json.dumps(tekken()))
        else:
            shutil.copy(shipped_tokenizer(), base / "tokenizer.model.v3")
        return base, random_weights(args)

    def shard(base: Path, stem: str, weights: dict[str, torch.Tensor]) -> None:
        names = sorted(weights)
        weight_map = {}
        for n in range(2):
            file = f"{stem}-{n + 1:05}-of-00002.safetensors"
            save_file({name: weights[name] for name in names[n::2]}, base / file)
            weight_map |= dict.fromkeys(names[n::2], file)
        index = {"metadata": {}, "weight_map": weight_map}
        (base / f"{stem}.safetensors.index.json").write_text(json.dumps(index))

    base, weights = begin("one file")
    write_params(base, ARGS)
    save_file(weights, base / "consolidated.safetensors")
    (base / "config.json").write_text(json.dumps(config_of(ARGS) | {"eos_token_id": 2}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 277]}))
    base, weights = begin("shards")
    write_params(base, ARGS)
    shard(base, "consolidated", weights)
    base, weights = begin("hf")
    (base / "config.json").write_text(json.dumps(config_of(ARGS) | {"eos_token_id": [2]}))
    shard(base, "model", their_state(weights, ARGS))
    base, weights = begin("pickle")
    write_params(base, ARGS)
    torch.save(weights, base / "consolidated.00.pth")
    base, weights = begin("fp8")
    yarn = {"original_max_position_embeddings": 16, "factor": 4, "beta": 4, "apply_scale": True}
    write_params(base, ARGS, quantization={"qformat_weight": "fp8_e4m3"}, yarn=yarn)
    save_file(in_fp8(weights, "qscale_weight"), base / "consolidated.safetensors")
    base, weights = begin("fp8 with pictures")
    config = config_of(ARGS, model_type="mistral", architectures=...)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.1, "rope_theta": 1e4}  # fmt: skip
    of_pictures = {
        "architectures": ["Mistral3ForConditionalGeneration"], "vision_config": {"depth": 1},
        "text_config": config | {"rope_parameters": rope, "head_dim": ARGS.head_dim},
        "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]},
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(of_pictures))
    stored = in_fp8(their_state(weights, ARGS), "weight_scale_inv")
    renamed = {name.replace("model.", "model.language_model.", 1): w for name, w in stored.items()}
    save_file(renamed | {"model.vision_tower.x": torch.zeros(2)}, base / "model.safetensors")
    base, weights = begin("sentencepiece", WIDE_ARGS)
    write_params(base, WIDE_ARGS)
    save_file(weights, base / "consolidated.safetensors")
    return bases


def in_fp8(weights: dict[str, torch.Tensor], scale: str) -> dict[str, torch.Tensor]:
    """The matrices of layers in FP8, each with a scale of its own."""
    stored = dict(weights)
    for name, weight in weights.items():
        if "layers." in name and weight.dim() == 2:
            unit = weight.abs().max() / 448
            stored[name] = (weight / unit).to(torch.float8_e4m3fn)
            stored[f"{name.removesuffix('.weight')}.{scale}"] = unit.reshape(())
    return stored


def dump(value: Any) -> str:
    """JSON of a value with `_Raw` texts in it."""
    if isinstance(value, _Raw):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def change_value(draw: random.Random, value: Any) -> Any:
    """A value of a JSON tree, changed somewhere."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.random()
        changed = dict(value)
        if kind < 0.1:
            del changed[key]
        elif kind < 0.2:
            name, extra = draw.choice(EXTRA_KEYS)
            changed[name] = extra
        elif kind < 0.25:
            changed[draw.choice((ESCAPE, key + "x", key.upper(), "n" * 5000))] = changed.pop(key)
        elif kind < 0.3:
            return _Raw(dump(value)[:-1] + f",{json.dumps(key)}:{dump(value[key])}" + "}")
        else:
            changed[key] = change_value(draw, value[key])
        return changed
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        kind = draw.random()
        middle = [change_value(draw, value[at])] if kind < 0.6 else [value[at]] * 2
        return value[:at] + ([] if kind > 0.8 else middle) + value[at + 1 :]
    if type(value) in (int, float) and draw.random() < 0.4:
        return draw.choice((value + 1, value - 1, value * 2, value // 2, -value, float(value)))
    return draw.choice(VALUES)


def change_bytes(draw: random.Random, data: bytes) -> bytes:
    """A file's bytes, changed somewhere; mostly near the beginning."""
    kind = draw.random()
    at = draw.randrange(min(len(data), 400) if draw.random() < 0.7 else len(data))
    if kind < 0.4:
        flipped = bytearray(data)
        for _ in range(draw.choice((1, 1, 3, 20))):
            flipped[(at + draw.randrange(50)) % len(data)] = draw.randrange(256)
        return bytes(flipped)
    if kind < 0.6:
        return data[:at]
    if kind < 0.7:
        return data + bytes(draw.choice((1, 1000)))
    if kind < 0.8:
        return data[:at] + data[at + draw.choice((1, 8)) :]
    return draw.choice(
        (b"", LFS, b"\0" * 100, b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, b"<html>", b"null",
         b"[]", b"{}", b"\x80\x02.", b"PK\x05\x06" + bytes(18))
    )  # fmt: skip


def change_safetensors(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = dump(change_value(draw, header)).encode("utf-8", "surrogatepass")
    claimed = len(text) if draw.random() < 0.9 else draw.choice((0, 2**62, 2**40, len(text) + 9))
    return claimed.to_bytes(8, "little") + text + data[8 + length :]


def change_pickle(draw: random.Random, path: Path, into: Path) -> None:
    """A torch.save file, written by a zip tool, or with other records."""
    method = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(into, "w", method) as new:
        infos = old.infolist()
        touched = draw.choice(infos) if draw.random() < 0.4 else infos[0]
        for info in infos[:: draw.choice((1, -1))]:
            data = old.read(info)
            if info is touched:
                kind = draw.random()
                if kind < 0.2:
                    continue
                if kind < 0.8:
                    data = change_bytes(draw, data)
            new.writestr(info.filename, data)


def change_kind(draw: random.Random, path: Path) -> None:
    """Something else in a file's place."""
    if path.is_dir():  # an earlier fault
        return
    path.unlink()
    kind = draw.choice(("fifo", "zero", "tty", "folder", "gone", "nowhere", "itself", "sparse"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind in ("zero", "tty", "nowhere", "itself"):
        links = {"zero": "/dev/zero", "tty": "/dev/ptmx", "nowhere": "gone", "itself": path.name}
        path.symlink_to(links[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.write_bytes(draw.choice((b"", b"{", (1 << 39).to_bytes(8, "little"))))
        os.truncate(path, SPARSE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One folder with its faults."""

    number: int
    folder: Path
    load_format: LoadFormat
    faults: tuple[str, ...]


def make_case(number: int, bases: list[Path], folder: Path) -> Case:
    """The case of a number; the same each time."""
    draw = random.Random(number)
    weights = [4, 3, 4, 4, 3, 3, 1]
    base = draw.choices(bases, weights[: len(bases)])[0]
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).symlink_to(path)
    faults = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        name = draw.choice(sorted(path.name for path in folder.iterdir()))
        path, source = folder / name, base / name
        kind = draw.random()
        if kind < 0.08:
            faults.append(f"another kind of {name}")
            change_kind(draw, path)
        elif kind < 0.12:
            other = folder / draw.choice(NAMES)
            if not other.is_symlink() and not other.exists():
                faults.append(f"{name} as {other.name}, too")
                other.symlink_to(source if source.exists() else "/dev/null")
        elif source.exists() and path.is_symlink():
            faults.append(f"{name} changed")
            data = source.read_bytes()
            path.unlink()
            if kind < 0.3:
                path.write_bytes(change_bytes(draw, data))
            elif name.endswith(".json"):
                changed = dump(change_value(draw, json.loads(data)))
                path.write_bytes(changed.encode("utf-8", "surrogatepass"))
            elif name.endswith(".safetensors"):
                path.write_bytes(change_safetensors(draw, data))
            elif name.endswith(".pth"):
                change_pickle(draw, source, path)
            else:
                path.write_bytes(change_bytes(draw, data))
    load_format: LoadFormat = draw.choices(("auto", "consolidated", "hf", "dummy"), (8, 1, 1, 1))[0]
    return Case(number=number, folder=folder, load_format=load_format, faults=(base.name, *faults))


@contextmanager
def bounded(stray: list[str]) -> Iterator[None]:
    """Raise TimeoutError after LIMIT_S; take what libraries write to stderr themselves."""

    def on_alarm(*_: object) -> None:
        raise TimeoutError(f"no answer in {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(LIMIT_S)
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            stray += file.read().decode(errors="replace").splitlines()


def run_case(case: Case) -> tuple[bool, str | None]:
    """Load a folder and answer.

    Returns:
        whether it could be loaded; the refusal, or None for an answer.
    """
    try:
        llm = LLM(case.folder, device="cpu", max_batch_size=1, load_format=case.load_format)
    except MistralChatError as error:
        return False, one_line(error)
    params = SamplingParams(max_tokens=3, logprobs=1, seed=1)
    with llm:
        try:
            answer = llm.generate("hello 12", params)[0]
            json.dumps([answer.text, answer.token_ids, answer.logprobs and [
                entry.logprob for entry in answer.logprobs
            ]], allow_nan=False)  # fmt: skip
            llm.chat([{"role": "user", "content": "hello"}], params)
        except MistralChatError as error:
            return True, one_line(error)
    return True, None


def inspect_case(case: Case) -> tuple[bool, str | None]:
    """Whether `inspect` says that a run would load the folder; else why not."""
    config = EngineConfig(model=case.folder, device="cpu", load_format=case.load_format)
    try:
        result = inspect._inspect(config, 1, None)
    except MistralChatError as error:
        return False, one_line(error)
    return bool(result["plans"][0]["fits"]), None


def judge(case: Case, *, inspects: bool) -> tuple[str, str | None]:
    """What came of a case: a word for it, and what is wrong with that, if anything is."""
    stray: list[str] = []
    started = time.monotonic()
    try:
        with bounded(stray):
            loaded, said = run_case(case)
            seen = inspect_case(case) if inspects else None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of Rust's is no Exception
        return "traceback", traceback.format_exc()[-3000:]
    outcome = "answer" if said is None else "refused" if not loaded else "no answer"
    if said is not None and not LEAST_CHARACTERS <= len(said) <= MOST_CHARACTERS:
        return outcome, f"a line of {len(said)} characters: {said}"
    if stray:
        return outcome, f"{len(stray)} more lines on stderr: {stray[0][:200]}"
    if seen is not None and seen[0] != loaded:
        return outcome, f"inspect says {seen}, a run {(loaded, said)}"
    if (took := time.monotonic() - started) > LIMIT_S:
        return outcome, f"took {took:.0f} s"
    return outcome, None


def fuzz(
    first: int,
    n: int,
    folder: Path,
    *,
    inspect_each: int = 10,
    on_case: Callable[[Case, str, str | None], None] = lambda case, outcome, wrong: None,
) -> tuple[Counter[str], list[str]]:
    """Judge cases by their numbers.

    Args:
        first: number of the first.
        n: how many.
        folder: an empty one, for theirs.
        inspect_each: `inspect` is asked as well about every so many.
        on_case: told of each.

    Returns:
        how often each outcome came; what was wrong, a text each.
    """
    bases = make_bases(folder / "bases")
    outcomes: Counter[str] = Counter()
    wrong = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in range(first, first + n):
        case = make_case(number, bases, folder / "case")
        outcome, fault = judge(case, inspects=number % inspect_each == 0)
        outcomes[outcome] += 1
        if fault is not None:
            wrong.append(f"case {number} ({', '.join(case.faults)}): {fault}")
        on_case(case, outcome, fault)
        shutil.rmtree(case.folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if grown > MOST_BYTES:
        wrong.append(f"{grown:,} bytes of memory were taken by {n} cases")
    return outcomes, wrong


def main() -> int:
    """Draw folders and say what came of them; the code to end with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--inspect_each", type=int, default=10)
    parser.add_argument("--all", action="store_true", help="print every case")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    slowest = (0.0, 0)
    last = time.monotonic()

    def on_case(case: Case, outcome: str, fault: str | None) -> None:
        nonlocal slowest, last
        now = time.monotonic()
        slowest, last = max(slowest, (now - last, case.number)), now
        if fault is not None or asked.all:
            print(
                f"{case.number} {case.faults} {case.load_format}: {outcome} {fault or ''}",
                flush=True,
            )

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, wrong = fuzz(
            asked.first, asked.n, Path(folder), inspect_each=asked.inspect_each, on_case=on_case
        )
    print(f"{asked.n} folders in {time.monotonic() - started:.0f} s: {dict(outcomes)}; slowest "
          f"{slowest[0]:.1f} s (case {slowest[1]}); {len(wrong)} wrong")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
