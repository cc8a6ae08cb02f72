"""Holds a rank in a phase of its life, for `tests.scripts.faults`; read at the start of Python.

HELD_PHASE names the phase and HELD_DIR a folder, where a rank that has come to it makes a file.
"""

import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOR_LONG_S = 120.0
PHASE, RANK = os.environ.get("HELD_PHASE"), os.environ.get("RANK", os.environ.get("HELD_ALONE"))


def mark() -> None:
    (Path(os.environ["HELD_DIR"]) / f"{PHASE}.{RANK}").write_text(str(os.getpid()))


def sleep() -> None:
    """For long, or until the file GO is there."""
    until = time.monotonic() + FOR_LONG_S
    while time.monotonic() < until and not (Path(os.environ["HELD_DIR"]) / "GO").exists():
        time.sleep(0.1)


def hold() -> None:
    mark()
    sleep()


def meet_late(group: Any) -> None:  # noqa: ARG001
    mark()
    if RANK != "0":
        sleep()


def finish_late(loading: Any) -> None:
    loading.Reading.finish = lambda self: hold()


def step_late(transformer: Any) -> None:
    forward = transformer.Transformer.forward
    n_decoded = 0

    def forward_late(self: Any, tokens: Any, *rest: Any) -> Any:
        nonlocal n_decoded
        if PHASE == "prefill" and len(tokens) > 1:
            mark()
            if RANK != "0" or "HELD_ALONE" in os.environ:  # rank 0 waits for the others' sums
                sleep()
        if PHASE == "decode" and len(tokens) == 1:
            n_decoded += 1
            time.sleep(0.05)
            if n_decoded == 3:
                mark()
        return forward(self, tokens, *rest)

    transformer.Transformer.forward = forward_late


def call(terminal_chat: Any) -> None:  # noqa: ARG001
    from tests.scripts.scripted import play

    calls = json.dumps([{"name": "wait", "arguments": {}}])
    play([["[TOOL_CALLS]", f" {calls}"], ["It waited."]], 0.0, Path(os.environ["HELD_MODEL"]))


AFTER: dict[str, tuple[str, Callable[[Any], None]]] = {
    "rendezvous": ("mistral_chat.engine.ranks.group", meet_late),
    "loading": ("mistral_chat.model.loading", finish_late),
    "prefill": ("mistral_chat.model.transformer", step_late),
    "decode": ("mistral_chat.model.transformer", step_late),
    "call": ("mistral_chat.cli.talk.terminal_chat", call),
}


class Finder:
    """Does something to a module once it is loaded, or holds before torch is."""

    def find_spec(
        self,
        name: str,
        path: Any,
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if PHASE == "import" and name == "torch":
            hold()
        awaited, do = AFTER.get(PHASE or "", ("", None))
        if name != awaited or do is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_do(module: ModuleType) -> None:
            execute(module)
            do(module)

        spec.loader.exec_module = execute_and_do  # type: ignore[method-assign]
        return spec


if PHASE and RANK is not None:
    Path(os.environ["HELD_DIR"]).with_name(f"rank {RANK}").write_text(str(os.getpid()))
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
    name, change = AFTER.get(PHASE, ("", None))
    if PHASE == "rendezvous":
        sys.modules.pop(name, None)  # a forked rank has imported it, and comes to it once more
    elif change is not None and name in sys.modules:
        change(sys.modules[name])
