"""One rank's model and cache: made from a config, then run step by step.

The same on every rank; rank 0's answers carry logits. Knows nothing of sequences' histories.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from mistral_chat.config import EngineConfig
from mistral_chat.engine.decoder import Choosing, Decoder, Pending
from mistral_chat.engine.exchange import Exchange, PeerExchange, open_exchange
from mistral_chat.engine.group import Group, Place
from mistral_chat.engine.loading import OnLoading, Watch
from mistral_chat.engine.memory import Plan, free_bytes, plan_memory
from mistral_chat.engine.step import Step
from mistral_chat.errors import CheckpointError, DeviceError, UsageError
from mistral_chat.kernels import ops
from mistral_chat.model.args import DEFAULT_MAX_SEQ_LEN, TransformerArgs, read_args
from mistral_chat.model.cache import KVCache
from mistral_chat.model.checkpoint import Headers, check_tensors, read_headers
from mistral_chat.model.few_rows import supports
from mistral_chat.model.loading import Reading
from mistral_chat.model.sharding import Shard, placements
from mistral_chat.model.transformer import Transformer

__all__ = [
    "Runner",
    "StartUp",
    "choose_device",
    "choose_dtype",
    "chunk_size_of",
    "load_model",
    "load_runner",
]

AnyTransformer = TypeVar("AnyTransformer", bound=Transformer)


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of a rank: auto is this rank's GPU where there are any, else the CPU.

    Raises:
        DeviceError: no GPU, or none of this rank's number.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not n_gpus):
        return torch.device("cpu")
    if not n_gpus:
        raise DeviceError(
            f"--device {device}, but torch {torch.__version__} sees no GPU here: use --device cpu, "
            f"or install a CUDA build of torch and check nvidia-smi"
        )
    if local_rank >= n_gpus:
        raise DeviceError(
            f"rank {local_rank} of this node needs GPU {local_rank}, but there are {n_gpus}: "
            f"expected at most {n_gpus} ranks a node"
        )
    torch.cuda.set_device(local_rank)
    # cuDNN's attention builds a plan for every new length: 30 to 40 ms a decoded token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local_rank)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Type of weights and cache: auto is float32 on CPU, else bfloat16 (float16 before sm80)."""
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


class Runner:
    """A loaded model with its cache; runs steps on this rank.

    Args:
        model: this rank's share, weights in place.
        group: the ranks.
        max_batch_size: slots of the cache.
        max_seq_len: positions of a slot.
        chunk_size: most tokens of a step.
        plan: bytes by purpose; None where nobody planned.
    """

    def __init__(
        self,
        model: Transformer,
        group: Group,
        *,
        max_batch_size: int,
        max_seq_len: int,
        chunk_size: int,
        plan: Plan | None = None,
    ) -> None:
        self.model = model
        self.group = group
        self.max_seq_len = max_seq_len
        self.chunk_size = chunk_size
        self.plan = plan
        self.cache = KVCache(model.shard, max_batch_size, max_seq_len, model.dtype, model.device)
        self.decoder: Decoder | None = None
        self.exchange: Exchange | None = None
        self.start_up: StartUp | None = None
        self._vocab_sizes = [len(model.shard.vocab_of(r)) for r in range(group.world_size)]

    def open_decoder(self) -> None:
        """Run steps of few tokens by `Decoder` from now on; all ranks together."""
        self.exchange = self.exchange or open_exchange(self.group, self.model)
        self.decoder = Decoder(self.model, self.cache, self.exchange, self.group.is_leader)
        self.decoder.warm_up()

    def resize(self, max_batch_size: int, max_seq_len: int) -> None:
        """Another cache in place of this one, which is forgotten; all ranks together."""
        model = self.model
        had_decoder, self.decoder = self.decoder is not None, None
        dtype, device = self.cache.k.dtype, self.cache.k.device
        del self.cache
        self.max_seq_len = max_seq_len
        self.cache = KVCache(model.shard, max_batch_size, max_seq_len, dtype, device)
        if had_decoder:
            self.open_decoder()

    @property
    def path(self) -> str:
        """How decode steps run here, for people."""
        if self.decoder is None:
            return f"reference ({why_no_decoder(self.model)})"
        exchange = self.exchange
        graphs = "CUDA graphs" if self.model.device.type == "cuda" else "one by one"
        return graphs + (f", sums through {exchange.path}" if exchange else "")

    @property
    def notice(self) -> str | None:
        """What people should know of a slower path than this machine's GPUs are for."""
        if self.model.device.type == "cuda" and (self.decoder is None or (
            self.exchange is not None and self.exchange.path != PeerExchange.path
        )):  # fmt: skip
            return f"decode takes a slower path here: {self.path}"
        return None

    def run(self, step: Step) -> Tensor | None:
        """Rank 0: run a step on all ranks.

        Returns:
            float32 logits (scored positions, vocabulary), or None for a step that scores none.
        """
        self.group.send(step)
        return self.forward(step)

    def decode(
        self, step: Step, choosing: Sequence[Choosing], uniforms: Sequence[Sequence[float]]
    ) -> list[Pending]:
        """Rank 0: have the device choose `step.n_tokens` tokens for each sequence.

        Args:
            step: its chunks, or none to go on with those of the step before.
            choosing: for each chunk, how.
            uniforms: for each token and sequence a random number in [0, 1).

        Returns:
            for each of the tokens where it will arrive.
        """
        assert self.decoder is not None
        self.group.send(step)
        if step.chunks:
            self.decoder.begin(step.chunks, choosing)
        return self.decoder.advance(step.n_tokens, uniforms)

    def forward(self, step: Step) -> Tensor | None:
        """Run a step on this rank; logits arrive on rank 0 alone.

        They may lie where the next step's will.
        """
        if self.decoder is not None and self.decoder.fits(step):
            return self.decoder.score(step.chunks)
        ids = [token for chunk in step.chunks for token in chunk.tokens]
        tokens = torch.tensor(ids, device=self.model.device)
        spans = [chunk.span for chunk in step.chunks]
        part = self.model(tokens, spans, self.cache, step.logits)
        return None if part is None else self.group.gather_columns(part, self._vocab_sizes)

    def follow(self) -> None:
        """Other ranks: run what rank 0 says until it ends the loop."""
        while (step := self.group.receive()) is not None:
            if step.n_tokens:
                assert self.decoder is not None
                if step.chunks:
                    self.decoder.begin(step.chunks)
                self.decoder.advance(step.n_tokens)
            else:
                self.forward(step)


def _shape(config: EngineConfig) -> TransformerArgs:
    if config.model is not None:
        return read_args(config.model, config.load_format)
    assert config.shape is not None
    try:
        return TransformerArgs.from_dict(config.shape)
    except CheckpointError as error:
        raise CheckpointError(f"--config, table [model]: {error}") from error


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """Seconds of what loading did; reading weights and making kernels ready run side by side.

    Args:
        load_s: all of it.
        check_s: to read what the model is, check its files and plan memory.
        weights_s: to read this rank's weights.
        weights_bytes: how much that was; 0 for random weights.
        kernels_s: to compile or load kernels, by their first use.
        capture_s: to capture the first graph.
        meanwhile_s: what else was done beside the reading.
    """

    load_s: float
    check_s: float
    weights_s: float
    weights_bytes: int
    kernels_s: float
    capture_s: float
    meanwhile_s: float


def _begin(
    config: EngineConfig, group: Group, make: Callable[[TransformerArgs], AnyTransformer]
) -> tuple[AnyTransformer, Plan, Reading | None]:
    """Check, plan, make the empty model and begin to read its weights, or draw them."""
    with group.together():
        args = replace(_shape(config), max_batch_size=config.max_batch_size)
        shard = Shard(args, group.shards, group.rank)
        device = choose_device(config.device, group.place.local_rank)
        dtype = choose_dtype(config.dtype, device)
    headers: Headers | None = None
    with group.together():
        if group.is_leader and config.load_format != "dummy":
            assert config.model is not None
            headers = read_headers(config.model, config.load_format)
            check_tensors(config.model, headers, placements(shard, headers.layout))
    headers = group.share(headers)
    with group.together():
        if config.max_seq_len and args.max_seq_len and config.max_seq_len > args.max_seq_len:
            raise UsageError(
                f"--max_seq_len {config.max_seq_len}: the model knows {args.max_seq_len} positions"
            )
        most = config.max_seq_len or args.max_seq_len or DEFAULT_MAX_SEQ_LEN
        plan = plan_memory(
            shard,
            dtype=dtype,
            device=device,
            free=free_bytes(device, group.place.local_world_size),
            n_slots=config.max_batch_size,
            chunk_size=min(chunk_size_of(config, device), most),
            max_seq_len=config.max_seq_len,
        )
    plan = replace(plan, max_seq_len=group.minimum(plan.max_seq_len))
    reading: Reading | None = None
    try:
        with group.together():
            with device, _default_dtype(dtype):
                model = make(args)
            if headers is None:
                model.init_weights(config.seed)
            else:
                if why_no_decoder(model) is None:  # its kernels run before the weights are there
                    for parameter in model.parameters():
                        parameter.data.zero_()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)  # threads that read have their own streams
                reading = Reading(model, headers, reading_threads(device, group.place))
                reading.start()
    except BaseException:
        if reading is not None:
            reading.abandon()
        raise
    return model, plan, reading


def _finish(reading: Reading | None, group: Group) -> None:
    is_whole = True
    with group.together():
        if reading is not None:
            is_whole = reading.finish()
    assert is_whole  # stopped only where a rank has failed


@contextmanager
def _watched(reading: Reading | None, group: Group, on_loading: OnLoading) -> Iterator[None]:
    if reading is None:
        yield
    else:
        with Watch(reading, group, on_loading):
            yield


def load_model(
    config: EngineConfig,
    group: Group,
    make: Callable[[TransformerArgs], AnyTransformer],
    on_loading: OnLoading = lambda loading: None,
) -> tuple[AnyTransformer, Plan]:
    """Check, plan and load this rank's share of the model; fails on all ranks or on none.

    Args:
        config: what to load and where.
        group: the ranks.
        make: gives an empty model of a shape, on torch's default device and in its default type.
        on_loading: on rank 0 told of progress, from a thread.

    Raises:
        CheckpointError: the folder or its weights cannot be used.
        DeviceError: a device or number of ranks that cannot be.
        NotEnoughMemoryError: it does not fit.
    """
    model, plan, reading = _begin(config, group, make)
    with _watched(reading, group, on_loading):
        _finish(reading, group)
    return model, plan


def load_runner(
    config: EngineConfig,
    group: Group,
    on_loading: OnLoading = lambda loading: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Runner:
    """`load_model`, with its cache; kernels are made ready while weights are read.

    Args:
        config: what to load and where.
        group: the ranks.
        on_loading: on rank 0 told of progress, from a thread.
        meanwhile: what else this rank is to do while weights are read; where it fails, all do.

    Raises:
        MistralChatError: as `load_model`, or from `meanwhile`.
    """

    def make(args: TransformerArgs) -> Transformer:
        return Transformer(args, Shard(args, group.shards, group.rank), group)

    started = time.monotonic()
    model, plan, reading = _begin(config, group, make)
    begun = time.monotonic()
    with _watched(reading, group, on_loading):
        runner = Runner(
            model,
            group,
            max_batch_size=config.max_batch_size,
            max_seq_len=plan.max_seq_len,
            chunk_size=chunk_size_of(config, model.device),
            plan=plan,
        )
        if why_no_decoder(model) is None:
            runner.open_decoder()
        ready = time.monotonic()
        with group.together():
            meanwhile()
        done = time.monotonic()
        _finish(reading, group)
    decoder = runner.decoder
    runner.start_up = StartUp(
        load_s=time.monotonic() - started,
        check_s=begun - started,
        weights_s=reading.seconds if reading else 0.0,
        weights_bytes=reading.total if reading else 0,
        kernels_s=decoder.kernels_s if decoder else 0.0,
        capture_s=decoder.capture_s if decoder else 0.0,
        meanwhile_s=done - ready,
    )
    return runner


def reading_threads(device: torch.device, place: Place) -> int:
    """Threads of one rank that read weights.

    On GPUs up to 16, what it takes to keep up with copies to the device (BENCHMARKS.md); on CPU
    all but free memory is the limit.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    each = (cores or 1) // place.local_world_size
    return max(2, min(16, each)) if device.type == "cuda" else max(1, min(4, each))


def why_no_decoder(model: Transformer) -> str | None:
    """Why steps of few tokens run as all others do; None where they have a path of their own."""
    why = ops.why_no_kernels(model.device)
    if why is None and not supports(model):
        why = f"no kernels for heads of {model.args.head_dim}"
    return why


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def chunk_size_of(config: EngineConfig, device: torch.device) -> int:
    """Most tokens of one step: as asked for, else what takes about half a second."""
    return config.chunk_size or (2048 if device.type == "cuda" else 256)
