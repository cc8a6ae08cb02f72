"""Triton's interpreter, less a search that takes half of its time.

Each call of one `triton.jit` function by another looks through `triton.language` for what is to be
replaced, which the launch has done already.
"""

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

__all__ = ["patch_once"]


def patch_once() -> None:
    """Have the interpreter replace in a module of the language only what it has not replaced."""
    patch = interpreter._patch_lang

    def patch_what_is_left(fn: Any) -> Any:
        modules = [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = patch_what_is_left
