"""`python -m benchmarks.gpu_first PART...`: what can be checked on a new GPU in minutes, without vLLM and Ray.

`ipc` reads a buffer of this process from two others, over several updates. `heads` times a teacher's LM head and holds
its scores against plain torch. `gradients` compares two ways to add up the head's gradient. `zero` holds DeepSpeed's
ZeRO 2 and 3 against plain torch over a few steps; it alone needs DeepSpeed. Each finding is one line; the exit code is
1 when one is wrong. Without a GPU the last three run small on the CPU.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from benchmarks.gpu_parts.learning import long_tailed_batch
from benchmarks.gpu_parts.shapes import TINY_STUDENT, Scale, dry_scale, model_folder
from cluster.config.objective import ObjectiveConfig
from cluster.config.presets import expand_preset
from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.contracts.requests import ScoreRequest
from cluster.models.lm_head import LmHead
from cluster.models.token_scores import chunk_size, score_tokens
from cluster.weight_sync.ipc_handles import plain_handle, rebuild_arguments
from learner.engines.base import TrainEngine
from learner.engines.torch import ReferenceEngine
from learner.loss.kernels.choice import choose_kernels
from learner.loss.objective import Objective
from learner.model.student import load_student

COMMAND = "python -m benchmarks.gpu_first"
READERS, UPDATES, BUFFER_BYTES, READ_BYTES = 2, 6, 1 << 28, 1000
REPEATS = 5
ANSWER_SECONDS, STAGE_SECONDS = 60.0, 120.0
HEAD_SETTINGS = ((0, False), (0, True), (16, False), (64, False))  # top-k, entropy
MAX_OFF_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of a log-probability, from float64
MAX_OFF_GRADIENT = 0.01  # of the norm; bfloat16 rounds to 0.004
ERRORS = (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError, Empty, subprocess.TimeoutExpired)
STAGES, STEPS, MICRO_BATCHES, LEARNING_RATE = (0, 2, 3), 3, 2, 1e-4
MAX_OFF_ZERO = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # of losses, norms and weights; relative above 1


@dataclass(frozen=True)
class Finding:
    """Says one thing that was measured, and whether it is as it should be."""

    text: str
    is_right: bool = True


def main() -> int:
    """Run the parts one after the other; exit code 1 when a finding is wrong."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all of them")
    parser.add_argument("--zero-stage", type=int, help=argparse.SUPPRESS)  # one stage, in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.folder is not None:
        outcome_of(options.zero_stage, options.folder).write_text(
            json.dumps(train(options.zero_stage, options.folder, device))
        )
        return 0
    is_right = True
    for part in options.parts or PARTS:
        for finding in findings_of(part, device):
            is_right &= finding.is_right
            print(f"{part}: {finding.text}{'' if finding.is_right else ': WRONG'}", flush=True)
    return 0 if is_right else 1


def findings_of(part: str, device: torch.device) -> Iterator[Finding]:
    """Yield a part's findings; an error is one more, so that the parts after it run."""
    try:
        yield from PARTS[part](device)
    except ERRORS as error:
        yield Finding(f"{type(error).__name__}: {error}", is_right=False)


def ipc_findings(device: torch.device) -> Iterator[Finding]:
    """Fill one exported buffer anew several times, and let two processes open and read it each time."""
    if device.type != "cuda":
        yield Finding("needs a GPU, and this machine has none")
        return
    spawn = multiprocessing.get_context("spawn")
    torch.empty(3_000_000, device=device)  # so that the buffer does not begin a block of torch's allocator
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
    plain = plain_handle(buffer)
    pipes = [(spawn.Queue(), spawn.Queue()) for _ in range(READERS)]
    readers = [spawn.Process(target=read_buffer, args=(plain, *pipe), daemon=True) for pipe in pipes]
    for reader in readers:
        reader.start()
    for update in range(1, UPDATES + 1):
        buffer.fill_(update)
        torch.cuda.current_stream().synchronize()
        for lengths, _ in pipes:
            lengths.put(READ_BYTES + update)
        answers = [sums.get(timeout=ANSWER_SECONDS) for _, sums in pipes]
        is_right = all(total == (READ_BYTES + update) * update for total, _ in answers)
        slowest = max(seconds for _, seconds in answers)
        yield Finding(f"update {update} read by {READERS} processes in {slowest * 1e3:.1f} ms", is_right)
        torch.cuda.empty_cache()
    for lengths, _ in pipes:
        lengths.put(None)
    for reader in readers:
        reader.join(ANSWER_SECONDS)


def read_buffer(plain: dict[str, Any], lengths: "Queue[int | None]", sums: "Queue[tuple[int, float]]") -> None:
    """Open the buffer for each length, as vLLM does for each update, and answer with the sum of so many bytes."""
    for length in iter(lengths.get, None):
        began = time.perf_counter()
        opened = rebuild_cuda_tensor(*rebuild_arguments(plain))
        total = int(opened[:length].clone().sum(dtype=torch.int64).item())
        del opened
        sums.put((total, time.perf_counter() - began))


def head_findings(device: torch.device) -> Iterator[Finding]:
    """Time the teacher's head for several requests beside its product alone, and check its log-probabilities."""
    on_gpu = device.type == "cuda"
    vocabulary, num_tokens, widths = (151_936, 8192, (2048, 4096)) if on_gpu else (4096, 64, (64,))
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    for width in widths:
        head = LmHead((torch.randn(vocabulary, width, device=device) * 0.05).to(dtype))
        hidden = torch.randn(num_tokens, width).to(dtype)
        ids = torch.randint(vocabulary, (num_tokens,)).numpy().astype(np.int32)
        size = f"width {width}, {num_tokens} tokens"
        exact = (hidden[:64].to(device).double() @ head.weight.double().T).log_softmax(-1).cpu()
        scores = score_tokens(head, hidden, ids, ScoreRequest("teacher"))
        off = float(np.abs(scores["logprobs"][:64] - exact.numpy()[np.arange(64), ids[:64]]).max())
        yield Finding(f"{size}: log-probabilities off by {off:.1e} nats", off < MAX_OFF_NATS[dtype])
        yield Finding(f"{size}: product alone {milliseconds(device, _product, head, hidden):.2f} ms")
        for top_k, entropy in HEAD_SETTINGS:
            request = ScoreRequest("teacher", top_k=top_k, entropy=entropy)
            scored = milliseconds(device, score_tokens, head, hidden, ids, request)
            yield Finding(f"{size}: scored, k = {top_k}{', entropy' * entropy}: {scored:.2f} ms")
        kernels = choose_kernels(device, whole_vocabulary=False)
        if kernels is not None:
            fused = milliseconds(device, _fused, head, hidden, kernels)
            yield Finding(f"{size}: the learner's kernel and a top-64: {fused:.2f} ms")
        if on_gpu:
            plain_copy = milliseconds(device, hidden.to, device)
            pinned_copy = milliseconds(device, hidden.pin_memory().to, device, None, True)
            yield Finding(f"{size}: hidden states to the GPU: {plain_copy:.2f} ms, pinned {pinned_copy:.2f} ms")


def _product(head: LmHead, hidden: Tensor) -> None:
    for chunk in hidden.to(head.weight.device).split(chunk_size(head)):
        head.logits(chunk)


def _fused(head: LmHead, hidden: Tensor, kernels: Any) -> None:
    for chunk in hidden.to(head.weight.device).split(chunk_size(head)):
        logits = head.logits(chunk)
        kernels.statistics(logits).whole.logprobs(logits.topk(64, dim=-1).values)


def gradient_findings(device: torch.device) -> Iterator[Finding]:
    """Add a chunk's gradient of the head to a float32 total, rounded to bfloat16 before, and not."""
    vocabulary, width, num_tokens = (151_936, 4096, 1766) if device.type == "cuda" else (512, 64, 32)
    torch.manual_seed(0)
    of_logits = torch.randn(num_tokens, vocabulary, device=device).bfloat16()
    hidden = torch.randn(num_tokens, width, device=device).bfloat16()
    exact = of_logits[:, :256].T.double() @ hidden.double()
    total = torch.zeros(vocabulary, width, device=device)

    def rounded() -> None:
        total.add_(of_logits.T @ hidden)

    def wide() -> None:
        torch.addmm(total, of_logits.T, hidden, out_dtype=torch.float32, out=total)

    for name, add in (("a product in bfloat16", rounded), ("addmm into float32", wide)):
        total.zero_()
        try:
            add()
        except (RuntimeError, TypeError) as error:  # not every torch and device has it
            yield Finding(f"{name}: not here: {str(error).partition('. ')[0]}")
            continue
        off = float((total[:256].double() - exact).norm() / exact.norm())
        yield Finding(f"{name}: {milliseconds(device, add):.2f} ms, off by {off:.1e}", off < MAX_OFF_GRADIENT)


def zero_findings(device: torch.device) -> Iterator[Finding]:
    """Train with plain torch and with ZeRO, each in a process of its own, and compare losses, norms and weights."""
    outcomes: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model_folder(zero_scale(device), zero_scale(device).student, Path(folder))
        for stage in STAGES:
            command = [sys.executable, "-m", "benchmarks.gpu_first", "--zero-stage", str(stage), "--folder", folder]
            environment = os.environ | {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
            if device.type == "cpu":
                environment.setdefault("DS_ACCELERATOR", "cpu")
            child = subprocess.run(command, env=environment, timeout=STAGE_SECONDS, capture_output=True, text=True)
            if child.returncode:
                last = (child.stderr.strip() or "no message").splitlines()[-1]
                yield Finding(f"stage {stage} ended with {child.returncode}: {last}", is_right=False)
                continue
            outcomes[stage] = json.loads(outcome_of(stage, Path(folder)).read_text())
            pairs = zip(outcomes[stage], outcomes[STAGES[0]], strict=True)
            off = max(abs(one - other) / max(abs(other), 1.0) for one, other in pairs)
            loss, *norms, weights = outcomes[stage]
            numbers = f"loss {loss:.4f}, norms {' '.join(f'{norm:.5f}' for norm in norms)}, weights {weights:.6f}"
            yield Finding(f"stage {stage}: {numbers}, off by {off:.1e}", off < MAX_OFF_ZERO[zero_scale(device).dtype])


def outcome_of(stage: int, folder: Path) -> Path:
    """Return where a stage's process leaves its numbers; DeepSpeed writes to standard output too."""
    return folder / f"outcome-{stage}.json"


def zero_scale(device: torch.device) -> Scale:
    """Return the sizes of the student that ZeRO trains."""
    if device.type == "cpu":
        return dry_scale()
    student = replace(
        TINY_STUDENT,
        hidden=512,
        intermediate=1024,
        layers=4,
        heads=8,
        key_value_heads=2,
        head_width=64,
        vocabulary=32_000,
    )
    return replace(
        dry_scale(),
        device=device,
        dtype=torch.bfloat16,
        student=student,
        mean_tokens=200,
        max_tokens=800,
        micro_batch_tokens=4096,
    )


def train(stage: int, folder: Path, device: torch.device) -> list[float]:
    """Take a few steps of two micro-batches; return the last loss, every gradient norm, and the norm of the weights."""
    scale = zero_scale(device)
    config = LearnerConfig(dtype=scale.dtype_name, zero_stage=stage)  # type: ignore[arg-type]
    student = load_student(StudentConfig(str(model_folder(scale, scale.student, folder))), config, device)
    engine: TrainEngine
    if stage == 0:
        engine = ReferenceEngine(student, config)
    else:
        from learner.engines.zero import ZeroEngine  # DeepSpeed, which picks its accelerator as it is imported

        engine = ZeroEngine(student, config, 0, 1, (folder / f"store-{stage}").as_uri())
    objective = Objective(
        msgspec.convert(expand_preset({"preset": "thinking-machines"}), ObjectiveConfig),
        choose_kernels(device, whole_vocabulary=False),
    )
    batch = long_tailed_batch(scale).to(device)
    norms = []
    for _ in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            evaluation = engine.forward(batch, objective)
            engine.backward(evaluation.loss, is_last=micro_batch == MICRO_BATCHES - 1)
        norms.append(engine.step(LEARNING_RATE, MICRO_BATCHES * len(batch.tokens)))
    engine.restore(engine.snapshot())
    names = [tensor.name for tensor in engine.student.manifest(scale.dtype_name)]
    with engine.full_parameters(names) as parameters:
        squares = sum(value.double().norm().item() ** 2 for value in parameters.values())
    return [evaluation.loss.item(), *norms, squares**0.5]


def milliseconds(device: torch.device, act: Callable[..., Any], *arguments: Any) -> float:
    """Return the mean time of an act after a first one."""
    act(*arguments)
    _wait(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        act(*arguments)
    _wait(device)
    return (time.perf_counter() - began) / REPEATS * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


PARTS: dict[str, Callable[[torch.device], Iterator[Finding]]] = {
    "ipc": ipc_findings,
    "heads": head_findings,
    "gradients": gradient_findings,
    "zero": zero_findings,
}

if __name__ == "__main__":
    sys.exit(main())
