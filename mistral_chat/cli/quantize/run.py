"""`mistral-chat quantize`: flags to work, progress, and the line that says what was written."""

import shlex
import time
from pathlib import Path

from mistral_chat.cli.codes import INTERRUPTED
from mistral_chat.cli.console import printing
from mistral_chat.cli.console.progress import byte_bar
from mistral_chat.cli.quantize.job import Job
from mistral_chat.cli.quantize.plan import plan
from mistral_chat.cli.requests import QuantizeRequest
from mistral_chat.cli.suggestions import require_model
from mistral_chat.config import EngineConfig
from mistral_chat.engine.ranks.launch import launched_rank
from mistral_chat.errors import CheckpointError
from mistral_chat.model.folder import ModelFolder
from mistral_chat.model.hf_config import config_of

__all__ = ["run"]


def run(request: QuantizeRequest) -> int:
    """Run the command; the code to end with."""
    if launched_rank() not in (None, 0):
        return 0
    require_model(request.model)
    started = time.monotonic()
    source = ModelFolder.checked(EngineConfig(model=request.model, device=request.device))
    job = Job(source=source, plan=plan(source, request.quantization), folder=request.folder)
    config_of(job.plan.args)  # refuses what cannot be written, before anything is
    try:
        with job.alone():
            if job.is_done:
                printing.say(f"{request.folder} is whole already: {_chat(request.folder)}\n")
                return 0
            if source.args.vision_encoder:
                printing.note("mistral-chat: the model's encoder of pictures is left out")
            try:
                _write(job, request)
            except KeyboardInterrupt:
                n_all = len(job.plan.shards)
                printing.note(
                    f"mistral-chat: interrupted with {n_all - len(job.left())} of {n_all} files "
                    f"written; the same command goes on: {_again(request)}",
                    whole=True,
                )
                return INTERRUPTED
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or request.folder}: {error.strerror or error}; the same command goes "
            f"on from the files that are written"
        ) from error
    before, after = job.plan.source_bytes, job.plan.n_bytes
    printing.say(
        f"{request.folder}: {request.quantization}, {after / 1e9:,.2f} GB of {before / 1e9:,.2f} "
        f"GB in {time.monotonic() - started:,.0f} s; {_chat(request.folder)}\n"
    )
    return 0


def _write(job: Job, request: QuantizeRequest) -> None:
    left = job.left()
    job.require_room(left)
    from mistral_chat.cli.quantize.write import write_shard
    from mistral_chat.engine.start_up import choose_device

    device = choose_device(request.device, 0)
    total = job.plan.source_bytes
    done = total - sum(shard.source_bytes for shard in left)
    with byte_bar(f"quantizing on {device.type}", total, done) as advance:
        for shard in left:
            write_shard(job.folder, shard, job.plan.quantization, device, advance)
    job.finish()


def _chat(folder: Path) -> str:
    return f"mistral-chat {shlex.quote(str(folder))} --instruct"


def _again(request: QuantizeRequest) -> str:
    words = ["mistral-chat", "quantize", str(request.model), str(request.folder)]
    words += ["--quantization", request.quantization]
    words += [] if request.device == "auto" else ["--device", request.device]
    return shlex.join(words)
