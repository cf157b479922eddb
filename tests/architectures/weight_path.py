"""Brings a learner's changed weights into a vLLM engine, and compares what the two then say; without Ray.

`python -m tests.architectures.weight_path FOLDER...` prints one line of JSON for each model.

What the learner names and packs, the payload's encoding, the receiver beside vLLM's model and vLLM's own loading are
those of a run. The engine lives in this process, so one process can try many models.
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.vllm.weight_sync.shared_memory import shared_memory
from cluster.weight_sync.manifest import Bucket, checksum, new_digest, plan_buckets, total_bytes
from cluster.weight_sync.transports import Encoded, make_payload, vllm_backend
from learner.checkpointing.export import export
from learner.engines.torch import ReferenceEngine
from learner.model.student import load_student
from learner.weight_sync.object_store import pack
from rollout_workers.vllm_engine import WORKER_EXTENSION
from tests.builders import make_config

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}

FP32 = LearnerConfig(dtype="float32")
BUCKET_BYTES = 1 << 16  # many buckets, some of which end in the middle of a packed layer
CONTEXT_TOKENS = 256
MAX_BYTES = 1 << 27
NOISE = 0.05  # added to every weight: less than what the models have, and far more than rounding
TOLERANCE = 5e-4  # nats; one expert or norm that stays behind makes tenths
SEQUENCES = [[(7 + 13 * place + 31 * row) % 600 for place in range(40 + 30 * row)] for row in range(4)]


class Learner:
    """A student in a plain engine, whose weights change at will."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = ReferenceEngine(load_student(StudentConfig(str(folder)), FP32), FP32)

    @torch.no_grad()
    def change_weights(self, seed: int, every: int = 1) -> None:
        """Change one of `every` values of each parameter."""
        random = torch.Generator().manual_seed(seed)
        for parameter in self.engine.student.causal_lm.parameters():
            flat = parameter.view(-1)[:: min(every, parameter.numel())]
            flat.add_(torch.randn(flat.shape, generator=random) * NOISE)

    def logprobs(self) -> list[torch.Tensor]:
        """Return the log-probability of every token but the first."""
        return logprobs_of(self.engine.student.causal_lm)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face directory as a run does."""
        export(self.engine, make_config(f"student.model={self.folder}"), folder)


class LocalSync:
    """Sends a learner's weights to an engine of this process, as `WeightUpdate` does through Ray."""

    def __init__(self, learner: Learner, payload: str) -> None:
        self._engine, self._payload, self._encoder = learner.engine, payload, make_payload(payload)
        self._base: int | None = None

    def publish(self, llm: Any, version: int, leave_out: str | None = None) -> str | None:
        """Send all buckets, without what has a certain part in its name; return the fault that the engine reports."""
        llm.collective_rpc("begin_update")
        digest = new_digest()
        manifest = self._engine.student.manifest("float32")
        sent = [tensor for tensor in manifest if leave_out is None or leave_out not in tensor.name]
        for bucket in plan_buckets(sent, BUCKET_BYTES):
            with self._engine.full_parameters([tensor.name for tensor in bucket]) as parameters:
                values = pack(bucket, parameters, np.empty(total_bytes(bucket), np.uint8))
            encoded = Encoded(values)
            if self._payload != "full":
                encoded = self._encoder.encode(bucket, values, self._base is not None)
            digest.update(values.data)
            self._send(llm, bucket, encoded, digest.hexdigest(), version)
        self._base = version if self._encoder.is_incremental else None
        [report] = llm.collective_rpc("finish_and_report")
        assert report["fault"] or report["checksum"] == digest.hexdigest()
        return report["fault"]

    def _send(self, llm: Any, bucket: Bucket, encoded: Encoded, so_far: str, version: int) -> None:
        with shared_memory(encoded.memory.tobytes()) as path:
            message = {
                "names": [tensor.name for tensor in bucket],
                "dtypes": [tensor.dtype for tensor in bucket],
                "shapes": [list(tensor.shape) for tensor in bucket],
                "checksum": checksum([encoded.memory]) if encoded.fields else so_far,
                "path": path,
                "num_bytes": len(encoded.memory),
                "payload": self._payload,
                "fields": dict(encoded.fields),
                "base_version": self._base if encoded.fields else None,
                "kept_as": version if self._encoder.is_incremental else None,
            }
            llm.collective_rpc("update_weights", args=(message,))


@contextmanager
def engine_for(folder: Path) -> Iterator[Any]:
    """Build a vLLM engine in this process."""
    from vllm import LLM
    from vllm.config import WeightTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder),
        dtype="float32",
        hf_overrides={},
        enforce_eager=True,
        max_model_len=CONTEXT_TOKENS,
        max_num_batched_tokens=CONTEXT_TOKENS,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=MAX_BYTES,
        disable_log_stats=True,
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config=WeightTransferConfig(backend=vllm_backend("object_store")),
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def engine_logprobs(llm: Any) -> list[torch.Tensor]:
    """Return what the engine says of every token but the first."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    prompts: Sequence[Any] = [{"prompt_token_ids": sequence} for sequence in SEQUENCES]
    answers = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return [
        torch.tensor([row[token].logprob for row, token in zip(answer.prompt_logprobs[1:], sequence[1:], strict=True)])
        for answer, sequence in zip(answers, SEQUENCES, strict=True)
    ]


@torch.no_grad()
def logprobs_of(causal_lm: Any) -> list[torch.Tensor]:
    """Return what a transformers model says of every token but the first."""
    found = []
    for sequence in SEQUENCES:
        logits = causal_lm(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, torch.tensor(sequence[1:])[:, None])[:, 0])
    return found


def try_model(folder: Path) -> dict[str, Any]:
    """Return how far engine and learner are apart after each way that new weights take, in nats; and faults."""
    learner = Learner(folder)
    found: dict[str, Any] = {"model": folder.name}
    with engine_for(folder) as llm:
        full, delta = LocalSync(learner, "full"), LocalSync(learner, "delta")
        found["loaded"] = gap(engine_logprobs(llm), learner.logprobs())
        before = learner.logprobs()
        learner.change_weights(seed=1)
        found["moved"] = gap(before, learner.logprobs())
        found["fault"] = full.publish(llm, 1)
        found["full"] = gap(engine_logprobs(llm), learner.logprobs())
        learner.change_weights(seed=2)
        found["fault"] = found["fault"] or delta.publish(llm, 2)
        learner.change_weights(seed=3, every=17)
        found["fault"] = found["fault"] or delta.publish(llm, 3)
        found["delta"] = gap(engine_logprobs(llm), learner.logprobs())
        found["without an expert"] = full.publish(llm, 4, leave_out=".experts.2.")
        norm = next(tensor.name for tensor in learner.engine.student.manifest("float32") if len(tensor.shape) == 1)
        found["without a norm"] = full.publish(llm, 5, leave_out=norm)
        found["again whole"] = full.publish(llm, 6) or gap(engine_logprobs(llm), learner.logprobs())
    with tempfile.TemporaryDirectory() as exported:
        learner.export(Path(exported))
        again = Learner(Path(exported))
        found["exported to transformers"] = gap(again.logprobs(), learner.logprobs())
        with engine_for(Path(exported)) as llm:
            found["exported to vLLM"] = gap(engine_logprobs(llm), learner.logprobs())
    return found


def gap(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Return the largest difference."""
    return float((torch.cat(list(some)) - torch.cat(list(others))).abs().max())


def main() -> int:
    """Print what each model's weights did; a model whose try ends in an exception ends all."""
    torch.set_num_threads(2)
    for folder in sys.argv[1:]:
        sys.stdout.write(json.dumps(try_model(Path(folder))) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
