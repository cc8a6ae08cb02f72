"""No command runs a file of the folder that a person stands in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, command_env

NAMES = ("torch", "json", "numpy", "typing", "pip", "mistral_common", "pydantic")
BIN = Path(sys.executable).parent


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder of modules that leave a mark where they are imported."""
    mark = f"open({str(tmp_path / 'marks')!r}, 'a').write(__file__ + '\\n')\n"
    folder = tmp_path / "trap"
    (folder / "mistral_chat").mkdir(parents=True)
    (folder / "mistral_chat" / "__init__.py").write_text(mark)
    for name in NAMES:
        (folder / f"{name}.py").write_text(mark)
    return folder


def _run(trap: Path, command: list[str]) -> str:
    done = subprocess.run(
        command,
        cwd=trap,
        env=command_env(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    marks = trap.parent / "marks"
    assert not marks.exists(), marks.read_text()
    assert done.returncode == 0, done.stderr
    return done.stdout


SCRIPT = [sys.executable, str(ROOT / "mistral-chat")]
TORCHRUN = [str(BIN / "torchrun"), "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    "form",
    [
        [*SCRIPT, "--nproc_per_node", "2", "--device", "cpu"],
        [*TORCHRUN, str(ROOT / "mistral-chat"), "--device", "cpu"],
        [sys.executable, "-m", "mistral_chat", "--device", "cpu"],
    ],
    ids=["own", "torchrun", "module"],
)
def test_commands_leave_the_current_folder_alone(
    trap: Path, tiny_folder: Path, form: list[str]
) -> None:
    if "-m" in form:  # Python itself takes the package from there
        (trap / "mistral_chat" / "__init__.py").unlink()
        (trap / "mistral_chat").rmdir()
    answer = ["--prompt", "Hello", "--max_tokens", "2", "--json"]
    out = _run(trap, [*form, str(tiny_folder), *answer])
    assert json.loads(out)["usage"]["completion_tokens"] == 2


def test_ranks_of_a_program_leave_the_current_folder_alone(trap: Path, tiny_folder: Path) -> None:
    code = """
import sys
from mistral_chat import LLM, SamplingParams
with LLM(sys.argv[1], nproc_per_node=2, device="cpu") as llm:
    print(len(llm.generate("Hello", SamplingParams(max_tokens=2))[0].token_ids))
"""
    program = trap.parent / "program.py"
    program.write_text(code)
    assert _run(trap, [sys.executable, "-P", str(program), str(tiny_folder)]) == "2\n"


def test_functions_find_what_lies_beside_them_after_the_standard_library(
    trap: Path, tmp_path: Path
) -> None:
    (trap / "beside.py").write_text("CITY = 'Paris'\n")
    (trap / "tools.py").write_text(
        "import json\nfrom typing import Any\nfrom beside import CITY\n\n"
        "def city() -> str:\n    'The city.'\n    return json.dumps(CITY)\n"
    )
    code = """
import sys
from pathlib import Path
from mistral_chat.chat.functions import PythonFunctions
from mistral_chat.chat.tools import ToolCall
with PythonFunctions(Path(sys.argv[1])) as functions:
    print(functions.call(ToolCall("a", "city", {})))
"""
    program = tmp_path / "program.py"
    program.write_text(code)
    out = _run(trap, [sys.executable, "-P", str(program), str(trap / "tools.py")])
    assert out == '"Paris"\n'
