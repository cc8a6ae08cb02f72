"""The names that people import, and what importing them costs."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from typing import Any

import pytest

import mistral_chat
from mistral_chat import errors
from tests.conftest import ROOT

HEAVY = ("torch", "mistral_common", "numpy", "transformers", "rich", "prompt_toolkit", "pydantic")


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_package_has_these_names_and_no_others() -> None:
    names = ["Answer", "Delta", "LLM", "SamplingParams", "Thinking", "__version__"]
    assert sorted(mistral_chat.__all__) == names
    for name in mistral_chat.__all__:
        assert getattr(mistral_chat, name) is not None


def test_package_names_are_the_classes_at_their_homes() -> None:
    from mistral_chat.chat.answer import Answer, Delta
    from mistral_chat.chat.llm import LLM
    from mistral_chat.chat.thinking import Thinking
    from mistral_chat.config import SamplingParams

    assert mistral_chat.Answer is Answer
    assert mistral_chat.Delta is Delta
    assert mistral_chat.LLM is LLM
    assert mistral_chat.SamplingParams is SamplingParams
    assert mistral_chat.Thinking is Thinking


def test_package_gives_all_its_names_to_a_star() -> None:
    names: dict[str, Any] = {}
    exec("from mistral_chat import *", names)
    assert set(mistral_chat.__all__) <= set(names)


def test_package_has_no_name_that_it_does_not_know() -> None:
    with pytest.raises(AttributeError, match=r"mistral_chat.*'Model'"):
        mistral_chat.Model  # noqa: B018
    with pytest.raises(ImportError):
        exec("from mistral_chat import Model")


def test_package_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", mistral_chat.__version__)


@pytest.mark.parametrize(
    "statement",
    [
        "import mistral_chat",
        "import mistral_chat.config, mistral_chat.errors",
        "from mistral_chat import SamplingParams; SamplingParams(temperature=0)",
        "import mistral_chat.engine.ranks.launch",
        "import mistral_chat.cli.main",
    ],
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    loaded = modules_after(statement)
    assert "mistral_chat" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_import_of_the_model_needs_no_tokenizer() -> None:
    loaded = modules_after("import mistral_chat.generate, mistral_chat.transformer")
    assert "torch" in loaded
    assert loaded.isdisjoint({"mistral_common", "rich", "prompt_toolkit", "transformers"})


def test_names_of_mistral_inference_are_where_its_users_look() -> None:
    from mistral_chat.generate import generate
    from mistral_chat.transformer import Transformer, TransformerArgs

    assert callable(generate)
    assert callable(Transformer.from_folder)
    assert next(iter(inspect.signature(Transformer).parameters)) == "args"
    required = [
        name
        for name, parameter in inspect.signature(TransformerArgs).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    assert required == ["dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads",
                        "norm_eps", "vocab_size"]  # fmt: skip


def test_llm_keeps_its_signature() -> None:
    parameters = inspect.signature(mistral_chat.LLM).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "model": inspect.Parameter.empty,
        "nproc_per_node": None,
        "device": "auto",
        "dtype": "auto",
        "max_seq_len": None,
        "max_batch_size": 8,
        "load_format": "auto",
        "quantization": "auto",
        "kv_cache_dtype": "auto",
    }
    kinds = {name: parameter.kind.name for name, parameter in parameters.items()}
    assert kinds.pop("model") == "POSITIONAL_OR_KEYWORD"
    assert set(kinds.values()) == {"KEYWORD_ONLY"}


def test_sampling_params_keep_their_names_and_defaults() -> None:
    parameters = inspect.signature(mistral_chat.SamplingParams).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "max_tokens": None,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "logprobs": None,
        "prompt_logprobs": False,
        "ignore_eos": False,
    }


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_tokens": 0}, "--max_tokens is 0"),
        ({"temperature": -0.1}, "--temperature is -0.1"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"top_p": 0.0}, "--top_p is 0.0"),
        ({"top_p": 1.1}, "--top_p is 1.1"),
        ({"top_k": -1}, "--top_k is -1"),
        ({"min_p": 1.5}, "--min_p is 1.5"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**63}, "--seed is 9223372036854775808"),
        ({"stop": ("ok", "")}, "--stop"),
        ({"logprobs": -1}, "--logprobs is -1"),
    ],
)
def test_sampling_params_name_a_value_out_of_range(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.UsageError, match=re.escape(named)):
        mistral_chat.SamplingParams(**settings)


def test_sampling_params_take_one_stop_text_for_a_list_of_one() -> None:
    params: Any = {"stop": "END"}
    assert mistral_chat.SamplingParams(**params).stop == ("END",)
    params = {"stop": ["a", "b"]}
    assert mistral_chat.SamplingParams(**params).stop == ("a", "b")


def test_all_errors_have_one_root_and_stand_in_the_drawing() -> None:
    assert errors.__doc__ is not None
    names = set(errors.__all__) - {"named", "one_line", "shown"}  # what messages are written with
    for name in names:
        found = getattr(errors, name)
        assert issubclass(found, errors.MistralChatError)
        assert re.search(rf"\b{name}\b", errors.__doc__)
    drawn = set(re.findall(r"\b\w+Error\b", errors.__doc__))
    assert drawn == names


def test_every_module_defines_what_it_offers() -> None:
    for found in pkgutil.walk_packages(mistral_chat.__path__, "mistral_chat."):
        if found.name != "mistral_chat.__main__":
            module = importlib.import_module(found.name)
            for public in getattr(module, "__all__", ()):
                assert hasattr(module, public), f"{found.name}.{public}"
