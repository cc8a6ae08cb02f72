"""The Python interface, and all of it against transformers on the embedded model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mistral_chat import LLM, Answer, SamplingParams
from mistral_chat.chat.answer import Delta
from mistral_chat.chat.chat import Chat
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.engine.engine import Engine, Prefill, Request
from mistral_chat.engine.step import Step
from mistral_chat.errors import (
    CheckpointError,
    ContextLengthError,
    MistralChatError,
    PromptError,
    TokenizerError,
    UsageError,
)
from tests.conftest import ROOT, TINY, command_env, open_folder
from tests.warm import warm

GREEDY = SamplingParams(temperature=0, max_tokens=12)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
# Long on purpose: with a wrong rotary order a short question is still answered.
PROSE = """\
The lighthouse stood on the last rock of the bay, and for as long as anyone in the village could \
remember, somebody of the same family had kept its lamp. In the winter the waves reached the \
lower windows, and the keeper slept in the room under the lantern, where the walls were dry. In \
the summer he painted the door, mended the boat and counted the ships. He wrote each of them down \
in a long book, with the hour, the weather and the direction, although nobody had ever asked for \
it. When the old keeper died, his daughter took over the lamp and the book. She was a careful \
woman who had studied mathematics in the city, and in the evenings she began to read what her \
father, her grandfather and his father had written. There were more than a hundred years of \
ships. At first she only counted them. Then she noticed that in some years the ships came early, \
and that in those years the herring came early too. She drew a line for the ships and a line for \
the fish, and the two lines went up and down together like two children on a swing. She wrote a \
letter about it to her old teacher, who did not answer for a long time. When he did, the letter \
was short. He wrote that she should send him the whole book, that he would pay for the post, and \
that she should not show it to anyone else. She thought about this for three days while the rain \
fell on the rock. On the fourth day the sun came out. She walked to the village, bought paper and \
ink, and started to copy the book, page by page, so that there would be two of them. It took her \
most of the year.

Question: What did the daughter find in the book, and why was it important?
Answer:"""


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, device="cpu", dtype="float32", max_batch_size=2) as made:
        yield made


def test_generate_answers_one_text(llm: LLM) -> None:
    (answer,) = llm.generate("Hello", GREEDY)
    assert isinstance(answer, Answer)
    assert len(answer.token_ids) == 12
    assert answer.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(llm.tokenizer.encode("Hello"))


def test_generate_answers_texts_in_their_order(llm: LLM) -> None:
    prompts = ["one", "two words", "and three words", "four", "five is the last"]
    answers = llm.generate(prompts, GREEDY)
    assert [a.token_ids for a in answers] == [
        llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts
    ]
    assert [a.text for a in answers] == [
        llm.tokenizer.raw.decode([*llm.tokenizer.encode("x"), *a.token_ids])[1:] for a in answers
    ]


def test_a_request_is_checked_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check = Engine.check

    def note(self: Engine, request: Request) -> None:
        checked.append(len(request.ids))
        check(self, request)

    monkeypatch.setattr(Engine, "check", note)
    params = SamplingParams(temperature=0, max_tokens=2)
    llm.generate([[1, 5], [1, 5, 6], [1, 7, 8, 9]], params)
    assert checked == [2, 3, 4]
    llm.chat([{"role": "user", "content": "a"}], params)
    list(llm.conversation().send("a", params))
    assert len(checked) == 5


def test_generate_takes_ids_for_texts(llm: LLM) -> None:
    texts = ["one", "two words"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    by_ids, by_text = llm.generate(ids, GREEDY), llm.generate(texts, GREEDY)
    assert [a.token_ids for a in by_ids] == [a.token_ids for a in by_text]
    assert llm.generate([tuple(ids[0])], GREEDY)[0].token_ids == by_text[0].token_ids


def test_generate_takes_params_for_each(llm: LLM) -> None:
    params = [replace(GREEDY, max_tokens=n) for n in (1, 5, 3)]
    answers = llm.generate(["a", "b", "c"], params)
    assert [len(a.token_ids) for a in answers] == [1, 5, 3]
    with pytest.raises(UsageError, match="2 SamplingParams for 3 prompts"):
        llm.generate(["a", "b", "c"], params[:2])


def test_generate_of_no_prompts_is_no_answers(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_generate_repeats_a_seed(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=10, seed=4)
    first, same, other = llm.generate(["x", "x", "x"], [params, params, replace(params, seed=5)])
    assert first.token_ids == same.token_ids
    assert other.token_ids != first.token_ids
    unseeded = llm.generate(["x", "x"], replace(params, seed=None))
    assert unseeded[0].seed != unseeded[1].seed
    again = llm.generate("x", replace(params, seed=unseeded[1].seed))
    assert again[0].token_ids == unseeded[1].token_ids


def test_generate_refuses_all_before_it_runs_any(llm: LLM) -> None:
    before = [list(held) for held in llm.engine._held]
    for bad, error in ((["ok", "word " * 600], ContextLengthError), ([[1], []], PromptError)):
        with pytest.raises(error):
            llm.generate(bad, GREEDY)
    assert llm.engine._held == before


def test_context_error_has_its_figures(llm: LLM) -> None:
    ids = [5] * 700
    with pytest.raises(ContextLengthError) as caught:
        llm.generate([ids], GREEDY)
    assert caught.value.prompt_tokens == 700
    assert caught.value.max_seq_len == TINY.max_seq_len == llm.engine.max_seq_len


def test_chat_answers_messages(llm: LLM) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    answer = llm.chat(messages, GREEDY)
    assert len(answer.token_ids) == 12
    again = llm.chat(messages, GREEDY)
    assert again.token_ids == answer.token_ids
    assert again.usage.cached_tokens == answer.usage.prompt_tokens - 1  # all but its last token


def test_chat_offers_tools(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    plain = llm.chat(messages, GREEDY).usage.prompt_tokens
    assert llm.chat(messages, GREEDY, [WEATHER]).usage.prompt_tokens > plain
    bare = llm.chat(messages, GREEDY, [WEATHER["function"]]).usage.prompt_tokens
    assert bare == llm.chat(messages, GREEDY, [WEATHER]).usage.prompt_tokens


def test_conversation_takes_tools_in_any_form(llm: LLM) -> None:
    made = llm.conversation(tools=[WEATHER]).conversation.tools
    assert llm.conversation(tools=[WEATHER["function"], *made]).conversation.tools == made * 2
    with pytest.raises(PromptError, match="tool 1: not a function schema"):
        llm.conversation(tools=[{"nothing": 1}])


def test_chat_names_a_tool_that_is_none(llm: LLM) -> None:
    with pytest.raises(PromptError, match="tool 2: not a function schema"):
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY, [WEATHER, {"name": 3}])


def test_conversation_streams_and_remembers(llm: LLM) -> None:
    chat = llm.conversation(system="Be brief.")
    assert isinstance(chat, Chat)
    *events, first = list(chat.send("Hi", GREEDY))
    assert isinstance(first, Answer)
    assert any(isinstance(e, Prefill) for e in events)
    assert "".join(e.text for e in events if isinstance(e, Delta)) == first.text
    *_, second = list(chat.send("And?", GREEDY))
    assert isinstance(second, Answer)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 12


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"device": "tpu"}, UsageError, "tpu"),
        ({"dtype": "int8"}, UsageError, "int8"),
        ({"max_seq_len": 1}, UsageError, "max_seq_len"),
        ({"max_seq_len": 513}, UsageError, "512"),
        ({"max_batch_size": 0}, UsageError, "max_batch_size"),
        ({"nproc_per_node": 0}, UsageError, "nproc_per_node"),
        ({"load_format": "gguf"}, UsageError, "gguf"),
    ],
)
def test_llm_names_an_option_that_it_cannot_use(
    tiny_folder: Path, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        LLM(tiny_folder, **({"device": "cpu"} | options))


def test_llm_names_a_folder_that_it_cannot_use(tmp_path: Path, broken_folder: Path) -> None:
    with pytest.raises(MistralChatError, match=r"nowhere: no such folder"):
        LLM(tmp_path / "nowhere", device="cpu")
    with pytest.raises(MistralChatError, match=r"params.json is a file"):
        LLM(broken_folder / "params.json", device="cpu")
    (broken_folder / "tokenizer.model.v3").unlink()
    with pytest.raises(TokenizerError, match="tokenizer is missing"):
        LLM(broken_folder, device="cpu")


def test_llm_with_ranks_is_llm_alone(llm: LLM, tiny_folder: Path) -> None:
    prompts = ["one", "two words", "and three words"]
    with LLM(tiny_folder, nproc_per_node=2, device="cpu", dtype="float32") as ranks:
        together = ranks.generate(prompts, GREEDY)
        ranks.close()
    ranks.close()  # it may be closed more than once
    assert [a.token_ids for a in together] == [a.token_ids for a in llm.generate(prompts, GREEDY)]


def test_llm_with_ranks_fails_as_llm_alone_does(tiny_folder: Path, tmp_path: Path) -> None:
    no_weights, no_tokenizer = (
        Path(shutil.copytree(tiny_folder, tmp_path / name)) for name in ("weights", "tokenizer")
    )
    (no_weights / "consolidated.safetensors").unlink()  # which all ranks need
    (no_tokenizer / "tokenizer.model.v3").write_bytes(b"")  # which one does
    body = (
        "from mistral_chat import LLM\n"
        f"for folder in {str(no_weights)!r}, {str(no_tokenizer)!r}:\n"
        "    try:\n"
        "        LLM(folder, nproc_per_node=2, device='cpu')\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    code, out, err = warm().run("-c", [body], command_env(), b"", 300)
    assert (code, err) == (0, b"")
    weights, tokenizer = out.decode().splitlines()
    assert weights.startswith(CheckpointError.__name__)
    assert "consolidated" in weights
    assert tokenizer.startswith(TokenizerError.__name__)
    assert "tokenizer.model.v3" in tokenizer


def test_llm_may_be_closed_more_than_once(tiny_folder: Path) -> None:
    with LLM(tiny_folder, device="cpu") as llm:
        llm.close()
    llm.close()


def test_llm_that_is_never_closed_ends_with_its_program(tiny_folder: Path) -> None:
    body = "from mistral_chat import LLM\nllm = LLM({!r}, nproc_per_node=2, device='cpu')\nprint(1)"
    done = subprocess.run(  # a fresh process, for its end is Python's own
        [sys.executable, "-W", "ignore", "-c", body.format(str(tiny_folder))],
        capture_output=True,  # returns once every process that holds the pipes has ended
        text=True,
        timeout=400,  # two ranks of a busy machine take their time to start
        env=command_env(PYTHONWARNINGS="ignore"),
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder a head's rows from neighbouring pairs (0 1 2 3) to two halves (0 2 1 3)."""
    heads = weight.unflatten(0, (-1, head_dim))
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)


def peer_of(folder: Path) -> Any:
    """Load the weights of our folder into transformers' Mistral, in float32."""
    from transformers import MistralConfig, MistralForCausalLM

    params = json.loads((folder / "params.json").read_text())
    config = MistralConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=params["hidden_dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        head_dim=params["head_dim"],
        rms_norm_eps=params["norm_eps"],
        max_position_embeddings=params["max_seq_len"],
        tie_word_embeddings=params["tied_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
        sliding_window=None,
    )
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
    }
    state = {}
    for name, weight in load_file(folder / "consolidated.safetensors").items():
        value = weight.float()
        if name.endswith((".wq.weight", ".wk.weight")):
            value = half_split(value, params["head_dim"])
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            state[f"model.layers.{layer}.{names[part]}.weight"] = value
        else:
            state[f"{names[stem]}.weight"] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model: Any = MistralForCausalLM(config)
    model = model.float().eval()
    model.load_state_dict(state, strict=True)
    return model


N_GREEDY = 16
N_FEW = 12
QUESTIONS = ("What is the capital of France?", "And of Italy?")
N_RANKS = (1, 2)  # two divide its 3 KV heads unevenly; tests/engine/test_ranks.py has 3 and 4


@dataclass(frozen=True)
class Said:
    """A model's output: greedy ids after PROSE, its likeliest tokens, and a chat."""

    ids: list[int]
    logprobs: list[tuple[int, float]]  # the likeliest first tokens
    answers: list[str]
    logits: Tensor  # of the first token


def said_by(folder: Path, n_ranks: int, prompt: list[int]) -> Said:
    params = SamplingParams(temperature=0, max_tokens=N_GREEDY, logprobs=50)
    with LLM(
        folder,
        nproc_per_node=n_ranks,
        device="cpu",
        dtype="float32",
        max_seq_len=512,
        max_batch_size=2,
    ) as llm:
        scored: list[Tensor] = []
        run = llm.engine.runner.run

        def run_and_keep(step: Step) -> Tensor | None:
            logits = run(step)
            if logits is not None and not scored:
                scored.append(logits[-1].clone())
            return logits

        llm.engine.runner.run = run_and_keep  # type: ignore[method-assign]
        (answer,) = llm.generate([prompt], params)
        chat = llm.conversation()
        answers = []
        for question in QUESTIONS:
            *_, last = chat.send(question, replace(params, max_tokens=N_FEW))
            assert isinstance(last, Answer)
            answers.append(last.text)
    assert answer.logprobs is not None
    likely = [(i, logprob) for i, _, logprob in answer.logprobs[0].top]
    return Said(list(answer.token_ids), likely, answers, scored[0])


def said_by_peer(folder: Path, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Greedy ids of transformers, and the logits of the first."""
    model = peer_of(folder)
    ids: list[int] = []
    with torch.inference_mode():
        out = model(torch.tensor([prompt]), use_cache=True)
        first = out.logits[0, -1].clone()
        while len(ids) < N_GREEDY:
            ids.append(int(out.logits[0, -1].argmax()))
            new = torch.tensor([ids[-1:]])
            out = model(new, past_key_values=out.past_key_values, use_cache=True)
    assert len(set(ids)) > 7  # text, and not one token again and again
    return ids, first


def test_embedded_model_on_any_number_of_ranks_is_transformers(embedded_folder: Path) -> None:
    """One test, so that each of them is loaded once."""
    prompt = Tokenizer.from_folder(open_folder(embedded_folder)).encode(PROSE)
    assert len(prompt) >= 300
    peer_ids, peer_logits = said_by_peer(embedded_folder, prompt)
    wanted = torch.log_softmax(peer_logits, -1)
    said = {n: said_by(embedded_folder, n, prompt) for n in N_RANKS}
    for n_ranks, ours in said.items():
        # logits reach 30; two programs add some 600 products in 30 layers in their own order: 1e-4
        assert (ours.logits - peer_logits).abs().max() < 1e-3, f"{n_ranks} ranks"
        assert ours.ids == peer_ids, f"{n_ranks} ranks"
        for i, logprob in ours.logprobs:
            assert logprob == pytest.approx(float(wanted[i]), abs=1e-3), f"{n_ranks} ranks"
        assert ours.answers == said[1].answers, f"{n_ranks} ranks"
    assert said[1].answers[0] == "The capital of France is Paris."
