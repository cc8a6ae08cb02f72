"""Nothing in the package unpickles: what comes from a socket or a file can run no code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mistral_chat

PACKAGE = Path(mistral_chat.__file__).parent
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# torch's own, whose objects travel pickled, and its default group, which belongs to nobody
FORBIDDEN = {"init_process_group", "destroy_process_group", "allow_pickle"}


def faults(source: str) -> Iterator[str]:
    """What in a file could unpickle."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        for name in names:
            last = name.split(".")[-1]
            if name.split(".")[0] in UNPICKLERS or last in FORBIDDEN or "object_list" in last:
                yield f"line {getattr(node, 'lineno', 0)}: {name}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if given.get("weights_only") != "True":
                yield f"line {node.lineno}: torch.load without weights_only=True"


def test_no_file_unpickles() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    found = {
        path.relative_to(PACKAGE): list(faults(path.read_text(encoding="utf-8"))) for path in paths
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import torch, pickle as p",
        "from pickle import loads",
        "import cloudpickle.cloudpickle",
        "dist.broadcast_object_list(box, src=0)",
        "from torch.distributed import all_gather_object_list",
        "dist.init_process_group('gloo')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_what_unpickles_is_found(line: str) -> None:
    assert list(faults(line))
