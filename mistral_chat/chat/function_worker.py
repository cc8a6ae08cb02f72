"""Run the user's Python file in a process of its own: describe its functions and call them.

Started by `functions.py` as a plain script, so that it loads neither this package nor torch:

    python -P function_worker.py FILE REQUESTS REPLIES LIFELINE MAX_CHARS

Requests and replies are JSON lines on separate pipes. stdin is empty; what the file prints goes to
stdout and stderr, which `functions.py` reads. Arguments are checked against the function's types
before the call, and nothing is evaluated.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import inspect
import json
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import IO, Annotated, Any, get_type_hints

import docstring_parser
import pydantic_core
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

MODULE_NAME = "mistral_chat_functions"
_STANDARD_LIBRARY = str(Path(os.__file__).parent)
_LEFT_OUT = object()  # marks an argument that the model did not give
_BY_POSITION = {
    inspect.Parameter.VAR_POSITIONAL: "takes *{}",
    inspect.Parameter.VAR_KEYWORD: "takes **{}",
    inspect.Parameter.POSITIONAL_ONLY: "takes {} by its position only",
}


class RefusedError(Exception):
    """The file, or one of its functions, cannot be offered; the message says why."""


class _Schema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False  # a title only repeats the name and costs tokens in every prompt


@dataclasses.dataclass(frozen=True)
class Function:
    """A function to offer to the model.

    Args:
        call: the function.
        arguments: validates a call's arguments.
        schema: name, description and parameters, as shown to the model.
    """

    call: Callable[..., Any]
    arguments: TypeAdapter[Any]
    schema: dict[str, Any]


def load_functions(path: Path) -> dict[str, Function]:
    """Return the public functions defined in a file, by name, in the file's order.

    Raises:
        RefusedError: the file cannot be imported, or one of its functions cannot be offered.
    """
    module = _import_file(path)
    functions = {
        name: _describe(name, value)
        for name, value in vars(module).items()
        if _is_own_function(module, name, value)
    }
    if not functions:
        raise RefusedError("found no public function: expected typed functions with docstrings")
    return functions


def _import_file(path: Path) -> ModuleType:
    # Modules beside the file can be imported but must not shadow the standard library.
    standard = [n for n, each in enumerate(sys.path) if each.startswith(_STANDARD_LIBRARY)]
    ours = [n for n in standard if not sys.path[n].endswith(("site-packages", "dist-packages"))]
    sys.path.insert(max(ours, default=-1) + 1, str(path.parent))
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module
    process = os.getpid()
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # also SystemExit: the file is not our code
        if isinstance(error, SyntaxError) and error.filename == str(path):
            raise RefusedError(f"line {error.lineno} is no Python ({error.msg})") from error
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f" at line {frames[-1].lineno}" if frames else ""
        raise RefusedError(f"cannot be imported{where} ({_in_short(error)})") from error
    finally:
        if os.getpid() != process:
            os._exit(0)  # a child that the file forked must not go on here
    return module


def _is_own_function(module: ModuleType, name: str, value: Any) -> bool:
    return (
        not name.startswith("_")
        and (inspect.isfunction(value) or hasattr(value, "__wrapped__"))
        and getattr(value, "__module__", None) == module.__name__
        and getattr(value, "__name__", None) == name  # neither imported nor an alias
    )


def _describe(name: str, function: Callable[..., Any]) -> Function:
    if not re.fullmatch(r"[a-zA-Z0-9_]{1,64}", name):
        raise RefusedError(f"{name}: expected a name of at most 64 ASCII letters, digits and _")
    is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    if is_async or inspect.isgeneratorfunction(function):
        kind = "async" if is_async else "a generator"
        raise RefusedError(f"{name} is {kind}: expected a plain function that returns its result")
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    description = "\n\n".join(filter(None, (doc.short_description, doc.long_description)))
    if not description:
        raise RefusedError(f"{name} has no docstring: expected one that says what it does")
    said = {param.arg_name: param.description for param in doc.params if param.description}
    arguments, parameters = _arguments_of(name, function, said)
    schema = {"name": name, "description": description, "parameters": parameters}
    return Function(function, arguments, schema)


def _arguments_of(
    name: str, function: Callable[..., Any], said: dict[str, str]
) -> tuple[TypeAdapter[Any], dict[str, Any]]:
    """Build the validator of a call's arguments, and their JSON schema.

    Args:
        name: name of the function.
        function: the function, with type annotations.
        said: parameter -> its description in the docstring.
    """
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception as error:  # annotations may run any code
        raise RefusedError(f"{name}: its annotations cannot be read ({error})") from error
    fields: list[Any] = []
    defaults: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        each, default = parameter.name, parameter.default
        if parameter.kind in _BY_POSITION:
            how = _BY_POSITION[parameter.kind].format(each)
            raise RefusedError(f"{name} {how}: expected parameters that are given by name")
        if each not in hints:
            raise RefusedError(f"{name}: the parameter {each} has no type")
        if isinstance(default, FieldInfo):  # would be passed to the function as it is
            raise RefusedError(
                f"{name}: the parameter {each} has a Field as its default: expected "
                f"Annotated[..., Field(...)] as its type"
            )
        hint = hints[each]
        _check_type(f"{name}: the parameter {each}", hint)
        own = any(getattr(mark, "description", None) for mark in getattr(hint, "__metadata__", ()))
        if each in said and not own:
            hint = Annotated[hint, Field(description=said[each])]
        if default is inspect.Parameter.empty:
            fields.append((each, hint))
        else:
            defaults[each] = default
            fields.append((each, hint, dataclasses.field(default_factory=lambda: _LEFT_OUT)))
    made_class = dataclasses.make_dataclass(
        "Arguments",
        fields,
        kw_only=True,
        namespace={"__pydantic_config__": ConfigDict(extra="forbid")},
    )
    arguments: TypeAdapter[Any] = TypeAdapter(made_class)
    schema = _json_schema(arguments)
    schema.pop("title", None)
    schema.pop("description", None)  # the generated dataclass's signature
    described = dict(
        zip((field[0] for field in fields), schema["properties"].values(), strict=True)
    )
    for each, default in defaults.items():
        try:  # by position, since an alias may replace the name
            described[each]["default"] = pydantic_core.to_jsonable_python(default)
        except ValueError:
            continue  # not JSON: the parameter is optional, but its default is not shown
    return arguments, schema


def _check_type(which: str, hint: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an alias has no effect here yet
            adapter: TypeAdapter[Any] = TypeAdapter(hint)
        _json_schema(adapter)
    except (PydanticUserError, pydantic_core.SchemaError, NameError, TypeError) as error:
        shown = getattr(hint, "__name__", None) or str(hint)
        if isinstance(error, PydanticUserError) and error.code == "typed-dict-version":
            raise RefusedError(
                f"{which} has the type {shown}: expected a TypedDict of typing_extensions, since "
                f"Python before 3.12 keeps too little of its own"
            ) from error
        raise RefusedError(
            f"{which} has the type {shown}, which no JSON value is: expected str, int, float, "
            f"bool, None, list, dict, Literal, an Enum, a dataclass, or unions of them"
        ) from error


def _json_schema(adapter: TypeAdapter[Any]) -> JsonSchemaValue:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about defaults that cannot be written as JSON
        return adapter.json_schema(schema_generator=_Schema)


def call_function(function: Function, arguments: str) -> tuple[bool, str]:
    """Validate the arguments and call the function.

    Args:
        function: the function to call.
        arguments: a JSON object, as text.

    Returns:
        whether it succeeded, and the result or the error as text.
    """
    try:
        checked = function.arguments.validate_json(arguments, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        listed = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']}" for fault in faults
        )
        return False, f"wrong arguments: {listed}"
    values = {field.name: getattr(checked, field.name) for field in dataclasses.fields(checked)}
    given = {name: value for name, value in values.items() if value is not _LEFT_OUT}
    process = os.getpid()
    try:
        value = function.call(**given)
    except BaseException as error:  # also SystemExit and KeyboardInterrupt raised by the function
        if os.getpid() == process:
            own = error.__traceback__.tb_next if error.__traceback__ else None
            with contextlib.suppress(OSError, ValueError, AttributeError):  # as in _flush
                traceback.print_exception(type(error), error, own)
        return False, _in_short(error)
    finally:
        if os.getpid() != process:
            os._exit(0)  # a child that the function forked must not go on here
    try:
        text = str.__str__(value) if isinstance(value, str) else _to_json(value)
    except BaseException as error:  # its objects may run code of their own
        return False, f"the result, of type {type(value).__name__}, is no JSON: {_in_short(error)}"
    return True, text


def _to_json(value: Any) -> str:
    return pydantic_core.to_json(value, inf_nan_mode="strings").decode()


def _in_short(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}) was called"
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # the exception's class may be the user's, too
        lines = []
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _die_with(lifeline: int) -> None:
    """Have the kernel kill this process group when the other end of the pipe closes.

    This needs no thread and no interpreter lock, which a hanging function may hold.
    """
    os.set_inheritable(lifeline, False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it closed before the signal was set up
        os._exit(1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # the file has closed or replaced it
            continue


def serve(path: Path, requests: IO[bytes], replies: IO[bytes], max_chars: int) -> None:
    """Describe the functions, then answer calls until the other end closes.

    Args:
        path: the user's Python file.
        requests: lines of `{"n", "name", "arguments"}`, where arguments is JSON as text.
        replies: gets `{"n": 0, "tools"}` or `{"n": 0, "refused"}`, then `{"n", "ok", "text",
            "n_chars"}` for each call.
        max_chars: longest text to send; n_chars is its full length.
    """

    def reply(value: dict[str, Any]) -> None:
        _flush()
        replies.write(json.dumps(value).encode() + b"\n")
        replies.flush()

    try:
        functions = load_functions(path)
    except RefusedError as error:
        reply({"n": 0, "refused": str(error)})
        return
    reply({"n": 0, "tools": [function.schema for function in functions.values()]})
    for line in requests:
        asked = json.loads(line)
        if asked["name"] in functions:
            ok, text = call_function(functions[asked["name"]], asked["arguments"])
        else:  # the file has changed since
            ok, text = False, f"there is no function {asked['name']}"
        reply({"n": asked["n"], "ok": ok, "text": text[:max_chars], "n_chars": len(text)})


def main() -> None:
    """Open the pipes by their file descriptors and serve."""
    file, requests, replies, lifeline, max_chars = sys.argv[1:]
    for handle in (int(requests), int(replies)):
        os.set_inheritable(handle, False)
    _die_with(int(lifeline))
    path = Path(file)
    sys.argv = [file]
    assert isinstance(sys.stdout, TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # not lost if the process is killed
    with open(int(requests), "rb") as asked, open(int(replies), "wb") as said:  # noqa: PTH123
        serve(path, asked, said, int(max_chars))


if __name__ == "__main__":
    main()
