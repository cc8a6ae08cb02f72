"""What is refused before ranks are started: each flag's file in every bad form, folders, numbers.

All command lines run in one process up to where ranks would be started; that process must never
have imported torch, so each costs what reading a few small files does.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, command_env, make_folder, write_params
from tests.scripts.before_ranks import STARTS

GOOD = {
    "file": ("a.txt", "Hello"),
    "system_file": ("s.txt", "Be brief"),
    "tools": ("t.json", json.dumps([{"name": "now", "parameters": {"type": "object"}}])),
    "python_tools": ("t.py", "def now() -> str:\n    '''The time.'''\n    return 'noon'\n"),
    "json_schema": ("s.json", '{"type": "object"}'),
    "config": ("p.toml", "[generation]\ntemperature = 0\n"),
}
FORMS: dict[str, Callable[[Path, bytes], object]] = {
    "missing": lambda path, good: None,
    "folder": lambda path, good: path.mkdir(),
    "endless": lambda path, good: path.symlink_to("/dev/zero"),
    "huge": lambda path, good: (path.touch(), os.truncate(path, 1 << 40)),
    "latin": lambda path, good: path.write_bytes(b"x = 'caf\xe9'\n" + good),
    "pointer": lambda path, good: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "hostile name": lambda path, good: None,
    "bom": lambda path, good: path.write_bytes(b"\xef\xbb\xbf" + good),
    "good": lambda path, good: path.write_bytes(good),
}
SAID = {
    "missing": "does not exist",
    "folder": "is a folder",
    "endless": "is no regular file",
    "huge": "has 1,099,511,627,776 bytes",
    "latin": "byte 0xe9 at offset 8",
    "pointer": "Git LFS pointer",
    "hostile name": "does not exist",
}
COMMANDS = ("", "batch", "bench")
_TAKES = {
    "": tuple(GOOD),
    "batch": ("system_file", "tools", "json_schema", "config"),
    "bench": ("json_schema", "config"),
}
BY_FLAG = [(command, flag) for command in COMMANDS for flag in _TAKES[command]]


@dataclass(frozen=True)
class Came:
    """What became of a command line."""

    code: int
    out: str
    err: str
    slow: list[str]


def run_all(folder: Path, lines: list[list[str]]) -> list[Came]:
    """What became of each command line, all in one process."""
    asked = folder / "lines.json"
    asked.write_text(json.dumps(lines))
    done = subprocess.run(
        [sys.executable, "-m", "tests.scripts.before_ranks", str(asked)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=180,
        env=command_env(XDG_DATA_HOME=str(folder / "data"), HF_HUB_CACHE=str(folder / "hub")),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return [Came(**value) for value in json.loads(done.stdout)]


def _line(command: str, model: Path, flag: str, path: Path, folder: Path) -> list[str]:
    words = {
        "": [str(model), "--prompt", "x"],
        "batch": ["batch", str(model), str(folder / "in.jsonl"), str(folder / "out.jsonl")],
        "bench": ["bench", str(model)],
    }[command]
    if flag not in ("json_schema", "config", "file"):
        words.append("--instruct")
    return [*words, f"--{flag.removeprefix('python_')}", str(path), "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def came(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Came]:
    """What became of every flag's file in every form, by command, flag and form."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "in.jsonl").write_text('{"prompt": "Hello"}\n')
    lines = {}
    for form, write in FORMS.items():
        home = folder / (
            form if form != "hostile name" else "\x1b]0;evil\x07\x1b[31m\u202e\n\x9b2J"
        )
        home.mkdir()
        for name, text in GOOD.values():
            write(home / name, text.encode())
        for command, flag in BY_FLAG:
            words = _line(command, tiny_folder, flag, home / GOOD[flag][0], folder)
            lines[f"{command} {flag} {form}"] = words
    return dict(zip(lines, run_all(folder, list(lines.values())), strict=True))


@pytest.mark.parametrize(("command", "flag"), BY_FLAG)
@pytest.mark.parametrize("form", SAID)
def test_bad_file_is_refused_in_one_line(
    came: dict[str, Came], command: str, flag: str, form: str
) -> None:
    done = came[f"{command} {flag} {form}"]
    if (flag, form) == ("python_tools", "latin"):  # Python says it in its own words
        assert "is no Python" in done.err
    else:
        assert SAID[form] in done.err
    assert (done.code, done.out) == (2 if flag == "config" else 1, "")
    assert done.err.startswith("mistral-chat: error: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert len(done.err) <= len("mistral-chat: error: ") + 300 + 1
    assert all(c.isprintable() for c in done.err[:-1])


@pytest.mark.parametrize(("command", "flag"), BY_FLAG)
@pytest.mark.parametrize("form", ["good", "bom"])
def test_good_file_is_taken(came: dict[str, Came], command: str, flag: str, form: str) -> None:
    done = came[f"{command} {flag} {form}"]
    assert (done.code, done.out, done.err) == (STARTS, "", "")


def test_nothing_heavy_is_imported_for_it(came: dict[str, Came]) -> None:
    assert {name for done in came.values() for name in done.slow} == set()


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _other_weights(folder: Path) -> None:
    write_params(folder, TINY, hidden_dim=128)


BROKEN: list[tuple[Callable[[Path], object], list[str], int, str]] = [
    (_without("params.json"), [], 1, "params.json is missing"),
    (_without("consolidated.safetensors"), [], 1, "weights are missing"),
    (_without("tokenizer.model.v3"), [], 1, "the tokenizer is missing"),
    (lambda f: (f / "tekken.json").write_text("{}"), [], 1, "found 2 tokenizers"),
    (_other_weights, [], 1, "has shape [96, 64]; expected [128, 64]"),
    (lambda f: os.truncate(f / "consolidated.safetensors", 9000), [], 1, "truncated"),
    (lambda f: None, ["--nproc_per_node", "5"], 1, "5 ranks, but the model has 4 query heads"),
    (lambda f: None, ["--max_seq_len", "513"], 2, "the model knows 512 positions"),
    (lambda f: None, ["--load_format", "hf"], 1, "config.json is missing"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_broken_folder_is_refused(tiny_folder: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello"}\n')
    lines = []
    for n, (breaks, words, _, _) in enumerate(BROKEN):
        folder = Path(shutil.copytree(tiny_folder, tmp_path / str(n)))
        breaks(folder)
        first = {
            "": [str(folder), "--prompt", "x"],
            "batch": ["batch", str(folder), str(tmp_path / "in.jsonl"), str(tmp_path / "out")],
            "bench": ["bench", str(folder)],
        }[command]
        lines.append([*first, *words])
    for done, (_, words, code, said) in zip(run_all(tmp_path, lines), BROKEN, strict=True):
        if command == "bench" and "tokenizer" in said:  # it takes none
            assert done.code == STARTS
            continue
        assert said in done.err, (words, done)
        assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
        assert "torch" not in done.slow
    assert not (tmp_path / "out").exists()


PRESETS: list[tuple[str, str]] = [
    (f"[generation]\nseed = {'1' * 5000}\n", "cannot be read as TOML"),
    (f"[generation]\nseed = {'1' * 4000}\n", "--seed is a number of more than 300 digits"),
    ("[generation]\nseed = inf\n", "'inf' is no whole number"),
    ("[run]\nnproc_per_node = 'x'\n", "'x' is no whole number"),
    ("[run]\n" + "a = " + "[" * 50_000 + "]" * 50_000 + "\n", "cannot be read as TOML"),
    ("[run\n", "is not TOML"),
    (f"[{'x' * 5000}]\n", "expected the tables [model], [run], [generation]"),
]
SHAPES: list[tuple[str, str]] = [
    ("n_heads = 'x'", "n_heads is 'x': expected a whole number"),
    ("n_heads = inf", "n_heads is inf: expected a whole number"),
    ("n_heads = 0", "n_heads is 0: expected a whole number"),
    ("n_heads = [[1]]", "n_heads is [[1]]: expected a whole number"),
    ("vocab_size = nan", "vocab_size is nan: expected a whole number"),
    ("norm_eps = 'x'", "norm_eps is 'x': expected a number"),
]
SHAPE = {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 4,
         "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 32768}  # fmt: skip


def test_faults_of_a_preset_are_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    lines, expected = [], []
    for n, (text, said) in enumerate(PRESETS):
        path = tmp_path / f"{n}.toml"
        path.write_text(text)
        lines.append([str(tiny_folder), "--prompt", "x", "--config", str(path)])
        expected.append((2, said))
    for n, (change, said) in enumerate(SHAPES):
        path = tmp_path / f"shape-{n}.toml"
        kept = {key: value for key, value in SHAPE.items() if key != change.split()[0]}
        path.write_text("\n".join(["[model]", change, *(f"{k} = {v}" for k, v in kept.items())]))
        lines.append(["--load_format", "dummy", "--prompt", "x", "--config", str(path)])
        expected.append((1, said))
    for done, (code, said) in zip(run_all(tmp_path, lines), expected, strict=True):
        assert said in done.err
        assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
        assert len(done.err) <= 330


def test_other_typos_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello"}\n')
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "bad.json").write_text('{"type": 5}')
    (tmp_path / "fifo").symlink_to("/dev/zero")
    model, source = str(tiny_folder), str(tmp_path / "in.jsonl")
    asked: list[tuple[list[str], int, str]] = [
        ([model], 1, "stdin is empty and there is no --prompt"),
        ([model, "--prompt", "\udce9"], 1, "--prompt is not UTF-8"),
        ([model, "x", "--instruct", "--tools", f"{tmp_path}/bad.py"], 1, "line 1 is no Python"),
        ([model, "x", "--json_schema", f"{tmp_path}/bad.json"], 1, "not a JSON schema"),
        ([model, "x", "--json_schema", f"{tmp_path}/bad.py"], 1, "bad.py is not JSON"),
        ([model, "--instruct", "--resume", "20200101-000000-abcd"], 2, "--resume goes on with"),
        (["batch", model, f"{tmp_path}/none", f"{tmp_path}/out"], 1, "none: cannot be read"),
        (["batch", model, str(tmp_path), f"{tmp_path}/out"], 1, "Is a directory"),
        (["batch", model, f"{tmp_path}/fifo", f"{tmp_path}/out"], 1, "is a device"),
        (["batch", model, source, f"{tmp_path}/no/out"], 1, "out: cannot be written (No such"),
        (["batch", model, source, str(tmp_path)], 1, "cannot be written (Is a directory)"),
        (["bench", model, "--shard_of", "5"], 1, "5 ranks, but the model has 4"),
        (["bench", model, "x"], 2, "expected one MODEL and flags"),
        (["inspect", model, "x"], 2, "expected one MODEL and flags"),
    ]
    for done, (words, code, said) in zip(
        run_all(tmp_path, [words for words, _, _ in asked]), asked, strict=True
    ):
        assert said in done.err, (words, done)
        assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), words
        assert "torch" not in done.slow


def test_misspelt_names_get_a_suggestion(tmp_path: Path) -> None:
    make_folder(tmp_path / "models" / "Mistral-Large-2407")
    (tmp_path / "models" / "Mistral-Large-2408").mkdir()  # nearer, but no model
    (tmp_path / "hub" / "models--mistralai--Ministral-8B-Instruct-2410").mkdir(parents=True)
    repo = "mistralai/Ministral-8B-Instruct-2410"
    near = str(tmp_path / "models" / "Mistral-Large-2407")
    asked = [
        (["dmeo"], 2, "did you mean mistral-chat demo?"),
        (["dmeo", "--prompt", "x"], 2, "did you mean mistral-chat demo?"),
        (["bnech", "MODEL", "--batches", "1"], 2, "did you mean mistral-chat bench?"),
        (["Downlaod", "a/b"], 2, "did you mean mistral-chat download?"),
        ([f"{tmp_path}/models/Mistral-Larg", "x"], 1, f"did you mean {near}?"),
        ([f"{tmp_path}/models/mistral-large-2408x", "x"], 1, f"did you mean {near}?"),
        (["bench", f"{tmp_path}/models/Mistral-Larg"], 1, f"did you mean {near}?"),
        (["inspect", f"{tmp_path}/models/Mistral-Larg"], 1, f"did you mean {near}?"),
        (["mistralai/Ministral-8B-Instruct", "x"], 1, f"did you mean {repo}?"),
        (["Ministral-8b-instruct-2410", "x"], 1, f"did you mean {repo}?"),
        (["What is it?"], 1, 'expected MODEL first, then the text: mistral-chat MODEL "TEXT"'),
        (["xyzzy", "x"], 1, "xyzzy: no such folder; expected a model folder"),
        (["x" * 5000, "x"], 1, "no such folder"),
        (["x" * 5000 + "/y", "x"], 1, "no such folder"),
    ]
    for done, (words, code, said) in zip(
        run_all(tmp_path, [words for words, _, _ in asked]), asked, strict=True
    ):
        assert said in done.err, (words, done)
        assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), words
        assert "torch" not in done.slow
