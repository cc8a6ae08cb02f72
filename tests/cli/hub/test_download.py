"""Downloads from a local hub: one layout, resuming, each refusal in one line."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from huggingface_hub import constants

from mistral_chat.cli.hub.errors import explain
from mistral_chat.cli.hub.fetch import _Partial
from mistral_chat.cli.repository import cached_folder, choose_files, is_repository
from mistral_chat.errors import CheckpointError, DownloadError
from tests.conftest import ROOT, Finished, Run, command_env
from tests.hub_server import COMMIT, Hub, Repository, commit_of, read_repository, serving
from tests.warm import Warm

NAME = "acme/tiny"
WEIGHTS = "consolidated.safetensors"
ONE_LAYOUT = ["config.json", "params.json", "tokenizer.model.v3", WEIGHTS]
CHUNK_BYTES = 10 << 20  # what huggingface_hub holds before it writes
# What a download needs before huggingface_hub, and much of what that needs.
BENEATH = ("mistral_chat.cli.main", "mistral_chat.cli.hub.download", "mistral_chat.cli.hub.fetch",
           "mistral_chat.cli.hub.errors", "email.message", "http.client", "http.cookiejar", "ssl",
           "urllib.request", "zipfile", "filelock", "tqdm.auto", "yaml")  # fmt: skip
ANSWER = ("--prompt", "Hi", "--max_tokens", "2", "--device", "cpu", "--seed", "1")


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[Hub]:
    """A hub with one repository, with both layouts and many files that no run needs."""
    with serving() as hub:
        repository = read_repository(tiny_folder)
        repository.files |= {
            "config.json": b'{"max_position_embeddings": 512}',
            "model-00001-of-00002.safetensors": b"first half",
            "model-00002-of-00002.safetensors": b"second half",
            "model.safetensors.index.json": b"{}",
            "tokenizer.json": b"{}",
            "README.md": b"# Tiny",
            "original/consolidated.safetensors": b"elsewhere",
        }
        hub.repositories[NAME] = repository
        yield hub


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a command that only knows this hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "",
        "HF_TOKEN": "",
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def run(run: Run) -> Iterator[Run]:
    """As ever, but downloads are forked, too: of a process without huggingface_hub.

    That reads the environment while it is imported.
    """
    forks = Warm(command_env(), BENEATH)

    def run_command(*words: str | Path, env: dict[str, str] | None = None, **how: Any) -> Finished:
        if words[0] != "download" or "PYTHONPATH" in (env or {}):
            return run(*words, env=env, **how)
        typed = [str(word) for word in words]
        code, out, err = forks.run("mistral_chat", typed, command_env(**(env or {})), b"", 300)
        return Finished(code, out.decode(), err.decode())

    yield run_command
    forks.close()


def refused(done: Finished, *said: str, code: int = 1) -> None:
    """Check that stderr is one line with this text."""
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.splitlines() == done.error_lines
    assert len(done.error_lines) == 1
    for text in said:
        assert text in done.err


def downloaded(done: Finished) -> Path:
    assert done.code == 0, done.err
    assert done.err == ""
    return Path(done.out.splitlines()[-1])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".cache")


def test_one_layout_is_fetched_and_a_run_finds_it_without_a_network(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    with serving() as hub:
        hub.repositories[NAME] = read_repository(tiny_folder)
        hub.repositories[NAME].files["model.safetensors"] = b"the other layout"
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
               "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        folder = downloaded(run("download", NAME, env=env))
    assert folder.parent.parent.name == "models--acme--tiny"
    assert names_in(folder) == sorted(set(ONE_LAYOUT) - {"config.json"})
    from_cache = run(NAME, *ANSWER, env=env)
    assert from_cache.code == 0, from_cache.err
    assert from_cache.out == run(tiny_folder, *ANSWER).out
    assert run("inspect", NAME, "--device", "cpu", env=env).code == 0


def test_cached_repository_runs_on_several_ranks(run: Run, hub: Hub, env: dict[str, str]) -> None:
    downloaded(run("download", NAME, env=env))
    hub.requests.clear()
    done = run(NAME, *ANSWER, torchrun=2, env=env)
    assert done.code == 0, done.err
    assert hub.requests == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ONE_LAYOUT),
        (("--layout", "consolidated", "--revision", "main"), ONE_LAYOUT),
        (("--revision", COMMIT), ONE_LAYOUT),
        (
            ("--layout=hf",),
            ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json", "tokenizer.model.v3"],
        ),
    ],
    ids=["auto", "consolidated", "commit", "hf"],
)  # fmt: skip
def test_folder_gets_one_layout(
    run: Run, hub: Hub, env: dict[str, str], tmp_path: Path, words: tuple[str, ...],
    expected: list[str],
) -> None:  # fmt: skip
    folder = downloaded(run("download", NAME, tmp_path / "here", *words, env=env))
    assert folder == tmp_path / "here"
    assert names_in(folder) == sorted(expected)
    for name in expected:
        assert (folder / name).read_bytes() == hub.repositories[NAME].files[name]
    assert set(hub.bytes_of) == set(expected)
    hub.heal()
    assert downloaded(run("download", NAME, tmp_path / "here", *words, env=env)) == folder
    assert hub.bytes_of == {}


@pytest.mark.parametrize("to_folder", [False, True], ids=["cache", "folder"])
def test_cut_download_goes_on_where_it_was(
    run: Run, hub: Hub, env: dict[str, str], tmp_path: Path, to_folder: bool
) -> None:
    words = ["download", NAME, *([tmp_path / "here"] if to_folder else [])]
    size = len(hub.repositories[NAME].files[WEIGHTS])
    assert size > 3 * CHUNK_BYTES // 2
    hub.cut_after = size - (1 << 20)
    refused(run(*words, env=env), NAME, "run the same command again")
    served = hub.bytes_of[WEIGHTS]
    assert CHUNK_BYTES < served < size
    hub.heal()
    folder = downloaded(run(*words, env=env))
    starts = [start for name, start in hub.ranges if name == WEIGHTS]
    assert len(starts) == 1
    assert served - CHUNK_BYTES <= starts[0] <= served
    assert starts[0] > 0
    assert hub.bytes_of[WEIGHTS] == size - starts[0]
    assert (folder / WEIGHTS).read_bytes() == hub.repositories[NAME].files[WEIGHTS]
    assert not list(tmp_path.rglob("*.incomplete"))


def test_interrupted_download_ends_quietly_and_goes_on(
    run: Run, hub: Hub, env: dict[str, str], tmp_path: Path
) -> None:
    size = len(hub.repositories[NAME].files[WEIGHTS])
    hub.pause_after = size - (1 << 20)
    words = ["download", NAME, str(tmp_path / "here")]
    process = subprocess.Popen(
        [sys.executable, "-m", "mistral_chat", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=command_env(**env), cwd=ROOT,
    )  # fmt: skip
    assert hub.paused.wait(60)
    part = tmp_path / "here" / f"{WEIGHTS}.incomplete"
    deadline = time.monotonic() + 60
    while not part.exists() or part.stat().st_size < CHUNK_BYTES:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)  # the hub's pause is longer
    assert (process.returncode, out, err) == (130, b"", b"")
    hub.heal()
    folder = downloaded(run(*words, env=env))
    assert hub.bytes_of[WEIGHTS] <= size - CHUNK_BYTES
    assert (folder / WEIGHTS).read_bytes() == hub.repositories[NAME].files[WEIGHTS]


def test_damaged_part_is_found_and_thrown_away(
    run: Run, env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    part = tmp_path / "here" / f"{WEIGHTS}.incomplete"
    part.write_bytes(b"\0" * 1000)
    words = ("download", NAME, tmp_path / "here")
    refused(run(*words, env=env), "sha256", "run the same command again")
    assert not part.exists()
    downloaded(run(*words, env=env))


def test_file_that_changed_under_its_name_is_fetched_again(
    run: Run, hub: Hub, env: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"an older model")
    downloaded(run("download", NAME, folder, env=env))
    assert (folder / WEIGHTS).read_bytes() == hub.repositories[NAME].files[WEIGHTS]


@pytest.mark.parametrize(
    ("lfs", "said"),
    [
        ({}, "pointerSize"),
        (
            {"pointerSize": 130, "sha256": "../../../../victim.txt"},
            "the sha256 '../../../../victim",
        ),
        ({"pointerSize": 130, "sha256": "/victim.txt"}, "the sha256 '/victim.txt'"),
        ({"pointerSize": 130, "sha256": "0" * 63}, "the sha256 '000"),
        ({"pointerSize": 130, "sha256": "\x1b" * 64}, "the sha256 '"),
    ],
)
def test_listing_of_a_hostile_hub_is_refused_and_writes_nothing(
    run: Run, hub: Hub, env: dict[str, str], tmp_path: Path, lfs: dict[str, object], said: str
) -> None:
    hub.repositories[NAME].lfs = lfs
    refused(run("download", NAME, env=env), said, "check HF_ENDPOINT")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_part_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "file.incomplete").symlink_to(tmp_path / "victim")
    with pytest.raises(DownloadError, match=r"file.incomplete is a link.*remove it"):
        _Partial(tmp_path / "file.incomplete", lambda n: None, threading.Event())
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_named(code: int) -> None:
    said = explain(OSError(code, os.strerror(code)), NAME, None)
    assert said is not None
    assert "no space is left" in said
    assert "what was fetched is kept" in said


def test_shortage_is_said_before_anything_is_fetched(
    run: Run, hub: Hub, env: dict[str, str]
) -> None:
    hub.repositories[NAME].claimed[WEIGHTS] = 10**18
    refused(run("download", NAME, env=env), "needs 1,000,000,000.", "free at", "make room")
    assert hub.bytes_of == {}


def test_unknown_repository_is_refused(run: Run, hub: Hub, env: dict[str, str]) -> None:
    done = run("download", "acme/other", env=env)
    refused(done, "acme/other", "no such repository", "private one looks the same", hub.url)


@pytest.mark.parametrize(
    ("files_only", "status", "code", "said"),
    [
        (False, 401, "GatedRepo", ("gated", "/acme/tiny", "HF_TOKEN", "/settings/tokens")),
        (True, 403, "GatedRepo", ("gated", "/acme/tiny", "HF_TOKEN", "none is set")),
        (False, 401, "RepoNotFound", ("private one looks the same",)),
        (False, 401, "", ("refuses access (401)", "HF_TOKEN")),
        (False, 403, "", ("refuses access (403)", "HF_TOKEN")),
        (True, 401, "", ("refuses access (401)", "HF_TOKEN")),
        (True, 403, "", ("refuses access (403)", "HF_TOKEN")),
        (True, 500, "", ("failed (500)", "run the same command again")),
        (False, 429, "", ("429", "wait")),
        (False, 500, "", ("failed (500)",)),
        (False, 404, "RevisionNotFound", ("no revision",)),
    ],
)
def test_refusal_of_the_hub_is_one_line(
    run: Run, hub: Hub, env: dict[str, str], files_only: bool, status: int, code: str,
    said: tuple[str, ...],
) -> None:  # fmt: skip
    if files_only:
        hub.repositories[NAME].refuse_files = status, code
    else:
        hub.repositories[NAME].refuse = status, code
    refused(run("download", NAME, env=env), NAME, *said)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "wait some minutes"),
        ({"Retry-After": "42"}, "wait 42 s"),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, "wait some minutes"),
        ({"RateLimit": '"api";r=0;t=1255', "Retry-After": "42"}, "wait 1,255 s"),
        ({"RateLimit": '"api";r=7;t=1255'}, "wait some minutes"),
    ],
)
def test_too_many_requests_say_how_long_to_wait(
    run: Run, hub: Hub, env: dict[str, str], headers: dict[str, str], said: str
) -> None:
    hub.repositories[NAME].refuse = 429, ""
    hub.repositories[NAME].refuse_headers = headers
    done = run("download", NAME, env=env)
    refused(done, f"{hub.url} says that these are too many requests (429): {said}; what was")


def test_wait_between_files_is_said_once_and_ends(run: Run, hub: Hub, env: dict[str, str]) -> None:
    repository = hub.repositories[NAME]
    repository.refuse_files, repository.n_refusals = (429, ""), 2
    repository.refuse_headers = {"Retry-After": "1"}
    done = run("download", NAME, env=env)
    assert done.code == 0, done.err
    folder = Path(done.out.splitlines()[-1])
    assert (folder / WEIGHTS).read_bytes() == repository.files[WEIGHTS]
    said = "mistral-chat: too many requests (429): going on in 2 s, as the hub asks\n"
    assert done.err in (said, said * 2)  # the second where the refusals came one after the other


def test_file_that_has_gone_since_it_was_listed_is_named(
    run: Run, hub: Hub, env: dict[str, str]
) -> None:
    for name in (WEIGHTS, "params.json"):
        hub.repositories[NAME].gone = {name}
        refused(run("download", NAME, env=env), NAME, "not there (404)", "run the same command")
    hub.repositories[NAME].gone = set()
    downloaded(run("download", NAME, env=env))


def test_branch_is_fetched_beside_main(
    run: Run, hub: Hub, env: dict[str, str], tmp_path: Path
) -> None:
    repository = hub.repositories[NAME]
    other = Repository(repository.files | {"params.json": b'{"other": 1}'}, repository.large)
    repository.branches["v2"] = other
    main = downloaded(run("download", NAME, env=env))
    hub.heal()
    branch = downloaded(run("download", NAME, "--revision", "v2", env=env))
    assert (main.name, branch.name) == (COMMIT, commit_of("v2"))
    assert (branch / "params.json").read_bytes() == b'{"other": 1}'
    assert (main / "params.json").read_bytes() == repository.files["params.json"]
    assert WEIGHTS not in hub.bytes_of  # both have the same
    here = downloaded(run("download", NAME, tmp_path / "here", "--revision", "v2", env=env))
    assert (here / "params.json").read_bytes() == b'{"other": 1}'


def test_token_opens_a_gated_repository(run: Run, hub: Hub, env: dict[str, str]) -> None:
    hub.repositories[NAME].token = "hf_right"
    wrong = run("download", NAME, env=env | {"HF_TOKEN": "hf_wrong"})
    refused(wrong, "gated", "the one in use has no access")
    assert "hf_wrong" not in wrong.err
    downloaded(run("download", NAME, env=env | {"HF_TOKEN": "hf_right"}))


def test_revision_that_is_not_there_is_refused(run: Run, env: dict[str, str]) -> None:
    done = run("download", NAME, "--revision", "v9", env=env)
    refused(done, "no revision 'v9'", "branch, tag or commit")


def test_no_network_is_named(run: Run, env: dict[str, str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refuses connections
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = run("download", NAME, env=env | {"HF_ENDPOINT": url})
    refused(done, url, "cannot be reached", "check the network")


def test_offline_mode_is_named(run: Run, hub: Hub, env: dict[str, str]) -> None:
    refused(run("download", NAME, env=env | {"HF_HUB_OFFLINE": "1"}), "HF_HUB_OFFLINE", "unset")
    assert hub.requests == []


def test_repository_without_known_weights_says_what_it_holds(
    run: Run, hub: Hub, env: dict[str, str]
) -> None:
    hub.repositories[NAME].files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    refused(run("download", NAME, env=env), "no known layout", "found pytorch_model.bin", NAME)


def test_model_that_is_not_downloaded_says_how(run: Run, hub: Hub, env: dict[str, str]) -> None:
    done = run("acme/other", *ANSWER, env=env)
    refused(done, "no such folder", "not downloaded", "mistral-chat download acme/other")
    hub.cut_after = 1 << 20
    run("download", NAME, env=env)
    requests = list(hub.requests)
    refused(run(NAME, *ANSWER, env=env), f"mistral-chat download {NAME}")
    assert hub.requests == requests


def test_model_with_a_wrong_flag_is_a_matter_of_usage(run: Run, env: dict[str, str]) -> None:
    refused(run("acme/other", "--temperature", "-1", env=env), "--temperature", code=2)


@pytest.mark.parametrize(
    ("revisions", "main", "chosen"),
    [(["a"], "a", "a"), (["a"], None, "a"), (["a", "b"], "b", "b"), (["a", "b"], None, None)],
)
def test_snapshot_of_main_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, revisions: list[str],
    main: str | None, chosen: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--acme--tiny"
    (home / "snapshots").mkdir(parents=True)
    (home / "refs").mkdir()
    for name in revisions:
        (home / "snapshots" / name).symlink_to(tiny_folder)
    if main:
        (home / "refs" / "main").write_text(main)
    if chosen is None:
        with pytest.raises(CheckpointError, match=r"2 revisions .* none of them is main"):
            cached_folder(NAME)
    else:
        assert cached_folder(NAME) == home / "snapshots" / chosen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "OWNER/NAME is missing"),
        (("tiny",), "expected OWNER/NAME"),
        (("../tiny",), "expected OWNER/NAME"),
        (("acme/tiny/more",), "expected OWNER/NAME"),
        ((NAME, "here", "there"), "at most one DIR"),
        ((NAME, "pyproject.toml"), "is a file"),
        ((NAME, "--layout", "gguf"), "--layout"),
        ((NAME, "--revision="), "--revision"),
        ((NAME, "--revison", "x"), "did you mean --revision?"),
    ],
)
def test_wrong_usage_of_download_is_code_2(
    run: Run, env: dict[str, str], words: tuple[str, ...], said: str
) -> None:
    refused(run("download", *words, env=env), said, code=2)


SHAPES = ["params.json", "config.json", "tekken.json"]


@pytest.mark.parametrize(
    ("files", "layout", "expected"),
    [
        (["consolidated.safetensors", "model.safetensors"], "auto", ["consolidated.safetensors"]),
        (["consolidated.safetensors", "model.safetensors"], "hf", ["model.safetensors"]),
        (["consolidated.00.pth", "README.md"], "auto", ["consolidated.00.pth"]),
        (["consolidated.00.pth", "consolidated.01.pth", "model.safetensors"], "auto",
         ["model.safetensors"]),
        (["consolidated-00001-of-00002.safetensors", "model.safetensors"], "auto",
         ["model.safetensors"]),
        (["consolidated-00001-of-00001.safetensors", "consolidated.safetensors",
          "consolidated.safetensors.index.json"], "auto",
         ["consolidated-00001-of-00001.safetensors", "consolidated.safetensors.index.json"]),
        (["pytorch_model.bin"], "auto", "found pytorch_model.bin"),
        (["model.safetensors"], "consolidated", "found model.safetensors"),
        (["model.gguf", "a.bin", "b.bin", "c.bin"], "auto", "and 1 more"),
        ([], "auto", "found config.json"),
    ],
)  # fmt: skip
def test_one_set_of_weights_is_chosen(
    files: list[str], layout: str, expected: list[str] | str
) -> None:
    names = [*SHAPES, *files]
    if isinstance(expected, str):
        with pytest.raises(DownloadError, match=re.escape(expected)):
            choose_files(names, layout)
        return
    chosen = choose_files(names, layout)
    assert sorted(set(chosen) - set(SHAPES)) == sorted(expected)
    assert "tekken.json" in chosen
    assert ("params.json" in chosen) == expected[0].startswith("consolidated")


def test_end_tokens_and_system_prompt_are_fetched_with_the_rest() -> None:
    names = ["params.json", "tekken.json", WEIGHTS, "generation_config.json", "SYSTEM_PROMPT.txt"]
    assert sorted(choose_files(names, "auto")) == sorted(names)


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model", "tokenizer.model.v7m1"])
def test_tokenizer_is_needed(name: str) -> None:
    files = ["params.json", "consolidated.safetensors", "tokenizer.json"]
    assert name in choose_files([*files, name], "auto")
    with pytest.raises(DownloadError, match="no tokenizer"):
        choose_files(files, "auto")


@pytest.mark.parametrize(
    ("word", "is_one"),
    [
        ("mistralai/Mistral-7B-v0.3", True),
        ("a/b", True),
        ("./a", False),
        ("/a/b", False),
        ("../a", False),
        ("a/b/c", False),
        ("a/", False),
        ("a", False),
        ("~/a", False),
        ("tests/cli", False),
    ],
)
def test_repository_is_told_from_a_path(
    monkeypatch: pytest.MonkeyPatch, word: str, is_one: bool
) -> None:
    monkeypatch.chdir(ROOT)
    assert is_repository(word) == is_one


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("download", "--help"), 0),
        (("download", NAME, "--revison", "x"), 2),
        (("download", "tiny"), 2),
        (("inspect", "--help"), 0),
        (("inspect", NAME, "--gpu_memry", "80GB"), 2),
        (("inspect", NAME, "--gpu_memory", "80"), 2),
        ((NAME, "--promt", "x"), 2),
    ],
)
def test_nothing_heavy_is_imported_before_flags_are_right(
    run: Run, env: dict[str, str], hub: Hub, tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    for name in ("huggingface_hub", "rich", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    done = run(*words, env=env | {"PYTHONPATH": str(tmp_path)})
    assert "was imported" not in done.err
    assert (done.code, len(done.error_lines)) == (code, 1 if code else 0)
    assert hub.requests == []


def test_progress_is_for_a_terminal(hub: Hub, env: dict[str, str]) -> None:
    words = ["-m", "mistral_chat", "download", NAME]
    child = pexpect.spawn(
        sys.executable, words, env=command_env(**env, TERM="xterm-256color"), cwd=str(ROOT),
        encoding="utf-8", dimensions=(24, 200), timeout=300,
    )  # type: ignore[arg-type]  # fmt: skip
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    shown = str(child.before)
    assert "downloading" in shown
    assert Path(shown.splitlines()[-1].rpartition("\x1b[2K")[2]).name == COMMIT
    assert set(hub.bytes_of) == set(ONE_LAYOUT)
