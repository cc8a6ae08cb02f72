"""What tests share: small model folders, the embedded model, and the command run for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
from safetensors.torch import save_file

from mistral_chat.config import EngineConfig, LoadFormat
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.checkpoint import Headers
from mistral_chat.model.folder import ModelFolder, choose_layout
from mistral_chat.model.loading import Reading
from mistral_chat.model.sharding import Shard, placements
from mistral_chat.model.transformer import Transformer
from tests.warm import fork_ranks, warm

# Processes of tests share two cores; more threads than that would only wait for each other.
torch.set_num_threads(1)
if not torch.cuda.is_available():  # CUDA takes no fork
    fork_ranks(lambda request, streams: warm().fork_rank(request, streams))

# A shell that runs tests in the background has them ignore Ctrl-C, and what they start as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
TINY = TransformerArgs(
    dim=64,
    n_layers=2,
    head_dim=16,
    hidden_dim=96,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=32768,
    max_seq_len=512,
)

# So many tokens take 10 s at the least: an answer that is interrupted or whose rank is killed is
# still going on then, also where the test has to wait for its turn.
ROOMY_SEQ_LEN = 8192


def random_weights(args: TransformerArgs, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every tensor of a checkpoint, at random but the same each time."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, placement in placements(Shard(args)).items():
        tensor = torch.randn(placement.shape, generator=generator)
        if tensor.dim() == 1:
            tensor = 1 + 0.1 * tensor
        elif not name.startswith("tok_embeddings"):
            tensor *= placement.shape[1] ** -0.5
        weights[name] = tensor.to(dtype)
    return weights


def folder_of(
    path: Path, args: TransformerArgs = TINY, load_format: LoadFormat = "auto"
) -> ModelFolder:
    """A model folder of a known shape; it need not have a params.json."""
    return ModelFolder(path=path, layout=choose_layout(path, load_format), args=args)


def open_folder(path: Path, load_format: LoadFormat = "auto") -> ModelFolder:
    """A model folder of the shape that its files say."""
    return ModelFolder.open(EngineConfig(model=path, load_format=load_format))


def read_args(path: Path, load_format: LoadFormat = "auto") -> TransformerArgs:
    """The shape that a folder's files say."""
    return open_folder(path, load_format).args


def reading_of(model: Transformer, headers: Headers, n_threads: int = 1) -> Reading:
    """What reads a rank's share of the weights."""
    return Reading(model, headers, headers.placements(model.shard), n_threads)


def load_weights(model: Transformer, headers: Headers, n_threads: int = 1) -> None:
    """Fill a model's parameters, as loading does."""
    reading = reading_of(model, headers, n_threads)
    reading.start()
    assert reading.finish()


def write_params(folder: Path, args: TransformerArgs, **changes: Any) -> None:
    """params.json of a shape; a change to None leaves the key out."""
    params = asdict(args) | changes
    params.pop("max_batch_size", None)
    (folder / "params.json").write_text(
        json.dumps({key: value for key, value in params.items() if value is not None})
    )


def shipped_tokenizer() -> Path:
    """A real v3 tokenizer, of mistral-common."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return Path(MistralTokenizer.v3().instruct_tokenizer.tokenizer.file_path)


def make_folder(folder: Path, args: TransformerArgs = TINY) -> Path:
    """A model folder in Mistral's format with random weights and a real tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_params(folder, args)
    save_file(random_weights(args), folder / "consolidated.safetensors")
    shutil.copy(shipped_tokenizer(), folder / "tokenizer.model.v3")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model; read only."""
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def roomy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context for long texts and answers; read only."""
    folder = tmp_path_factory.mktemp("models") / "roomy"
    return make_folder(folder, replace(TINY, max_seq_len=ROOMY_SEQ_LEN))


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that runs in this process fails the test where it would load a model."""
    from mistral_chat.cli import start

    def load(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(start, "load", load)


@pytest.fixture
def broken_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The embedded model, converted on first use."""
    from mistral_chat.cli.hub.embedded import embedded_model

    return embedded_model()


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [x for x in self.err.splitlines() if x.startswith("mistral-chat: error:")]


Run = Callable[..., Finished]


def command_env(**changes: str) -> dict[str, str]:
    """The environment of a command: this one's, less what a launcher or a fancy terminal set."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NO_COLOR")
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    return kept | {"PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"} | changes


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # perhaps while it was looked at
        return False


def wait_for_end(pid: int) -> None:
    """Until a process runs no more."""
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def torchrun_words(n_ranks: int) -> list[str]:
    """The words before a module's name that have torchrun start it on this node, after `-m`."""
    free = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    return ["torch.distributed.run", "--nproc-per-node", str(n_ranks), *free, "-m"]


@pytest.fixture(scope="session")
def run() -> Run:
    """Run `mistral-chat WORDS`, alone or under torchrun, with stdin from a pipe."""

    def run_command(
        *words: str | Path,
        stdin: str | bytes | None = "",
        torchrun: int = 0,
        timeout_s: float = 300,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> Finished:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        module, *typed = [*(torchrun_words(torchrun) if torchrun else []), "mistral_chat"]
        typed += map(str, words)
        # CUDA takes no fork, and another PYTHONPATH may bring other libraries.
        needs_fresh = "PYTHONPATH" in (env or {}) or options or torch.cuda.is_available()
        if data is not None and not needs_fresh:
            code, out, err = warm().run(module, typed, command_env(**(env or {})), data, timeout_s)
            return Finished(code, out.decode(), err.decode())
        done = subprocess.run(
            [sys.executable, "-m", module, *typed],
            input=data,
            capture_output=True,
            timeout=timeout_s,
            env=command_env(**(env or {})),
            cwd=ROOT,
            check=False,
            **options,
        )
        return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run_command
