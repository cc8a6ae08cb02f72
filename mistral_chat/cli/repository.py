"""A Hugging Face repository's files: which make one model, and which lie in the cache already.

Looks at names and at this machine's disk; nothing here touches the network.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from mistral_chat.errors import CheckpointError, DownloadError
from mistral_chat.files import is_there

__all__ = [
    "cached_folder",
    "cached_repositories",
    "choose_files",
    "home_of",
    "is_name",
    "is_repository",
]

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
MOST_LETTERS = 96  # huggingface_hub's own limit
_TOKENIZER = re.compile(r"tekken\.json|tokenizer\.model(\.v\w+)?")


def is_name(word: str) -> bool:
    """Whether a word can be a repository's name: owner/name."""
    return len(word) <= MOST_LETTERS and _REPOSITORY.fullmatch(word) is not None


def is_repository(word: str) -> bool:
    """Whether MODEL can only be meant as a repository: owner/name, and no path that exists."""
    return is_name(word) and not is_there(Path(word))


def cached_folder(repo: str) -> Path:
    """The snapshot of a repository in huggingface_hub's cache that holds a whole model.

    That of the branch main where there is one, else the only one.

    Raises:
        CheckpointError: none, or several of which none is main's.
    """
    home = home_of(repo)
    main = home / "refs" / "main"
    head = home / "snapshots" / main.read_text().strip() if main.is_file() else None
    if head is not None and _is_whole(head):
        return head
    snapshots = home / "snapshots"
    whole = [path for path in snapshots.glob("*") if _is_whole(path)]
    if len(whole) > 1:
        raise CheckpointError(
            f"{repo}: {len(whole)} revisions are downloaded and none of them is main: expected "
            f"one; give the folder of the one that is meant ({', '.join(map(str, sorted(whole)))})"
        )
    if not whole:
        found = "downloaded in part only" if snapshots.is_dir() else "not downloaded"
        raise CheckpointError(
            f"{repo}: no such folder, and as a Hugging Face repository {found}: "
            f"mistral-chat download {repo} fetches it"
        )
    return whole[0]


def home_of(repo: str) -> Path:
    """Where huggingface_hub's cache keeps a repository: blobs, snapshots and refs."""
    return _cache() / f"models--{repo.replace('/', '--')}"


def cached_repositories() -> Iterator[str]:
    """Names of the repositories of models in huggingface_hub's cache."""
    for path in _cache().glob("models--*--*"):
        yield path.name.removeprefix("models--").replace("--", "/", 1)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _is_whole(folder: Path) -> bool:
    try:
        # A link whose blob has gone does not exist.
        choose_files([path.name for path in folder.glob("*") if path.exists()], "auto")
    except DownloadError:
        return False
    return True


def choose_files(names: Collection[str], layout: str) -> list[str]:
    """The files of one model: one set of weights, its shape, its tokenizer, its system prompt.

    Args:
        names: of a repository's files.
        layout: "consolidated", "hf", or "auto" for the first of them that is whole.

    Raises:
        DownloadError: no whole set of weights, or no tokenizer; says what was found.
    """
    top = sorted(name for name in names if "/" not in name)
    tokenizers = [name for name in top if _TOKENIZER.fullmatch(name)]
    for known, shapes in (("consolidated", ("params.json", "config.json")),
                          ("hf", ("config.json",))):  # fmt: skip
        if layout not in ("auto", known) or shapes[0] not in top:
            continue
        weights = _weights(top, "consolidated" if known == "consolidated" else "model")
        if weights and not tokenizers:
            raise DownloadError(
                "it holds weights but no tokenizer: expected tekken.json or tokenizer.model.vN"
            )
        if weights:
            # What may name end tokens, and what --system default takes.
            beside = (*shapes, "generation_config.json", "SYSTEM_PROMPT.txt")
            return [*(name for name in beside if name in top), *tokenizers, *weights]
    files = [name for name in top if name.endswith((".safetensors", ".pth", ".bin", ".gguf"))]
    found = files or top
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    expected = {
        "consolidated": "params.json with consolidated*.safetensors",
        "hf": "config.json with model*.safetensors",
    }
    raise DownloadError(
        f"no known layout of weights: found {', '.join(found[:3]) or 'nothing'}{more}; expected "
        + (" or ".join(expected.values()) if layout == "auto" else expected[layout])
        + ", all shards of it"
    )


def _weights(names: Sequence[str], stem: str) -> list[str]:
    """The one set of weights whose files begin with `stem`; shards come before a single file."""
    shards: dict[int, list[str]] = {}
    for name in names:
        if match := re.fullmatch(rf"{stem}-\d+-of-(\d+)\.safetensors", name):
            shards.setdefault(int(match[1]), []).append(name)
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        ((total, files),) = shards.items()
        if len(files) == total:
            return [*(name for name in names if name == index), *files]
    if single in names:
        return [single]
    pickles = [name for name in names if re.fullmatch(rf"{stem}\.\d+\.pth", name)]
    return pickles if len(pickles) == 1 else []
