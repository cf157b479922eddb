"""The rollout engine on vLLM: seeded completions with log-probabilities, and weights replaced while requests run."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.exceptions import VLLMClientError
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from cluster.contracts.config import EngineConfig, StudentConfig
from cluster.contracts.errors import ActorDiedError, RolloutError, WeightSyncError
from cluster.contracts.interfaces import Completion, SamplingSettings
from cluster.contracts.trajectory import FinishReason, Ints
from cluster.vllm_runtime import EngineRole, build_engine
from rollout_workers.candidate_draws import DrawOrder
from rollout_workers.draw_fetcher import DrawFetcher, Encoded
from rollout_workers.draw_processor import ask_for_draws, draws_from_bytes
from rollout_workers.mapped_memory import mappable

OBJECT_STORE = "object_store"
DRAWS = "rollout_workers.draw_processor"  # the module; vLLM loads its classes by name
NO_LIMIT = -1  # of log-probabilities per token, to vLLM
UNVERIFIED = "unverified"  # vLLM's own backends report nothing of what they received
FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "repetition": "repetition",
    "abort": "abort",
}
STARTED_WITH = "default"  # vLLM's label of the weights that it loaded itself
REPETITIONS = 4  # of a passage, one after the other, that end a completion


class VllmRolloutEngine:
    """A RolloutEngine that runs the student in vLLM; build it inside a running event loop."""

    def __init__(
        self,
        student: StudentConfig,
        engine: EngineConfig,
        max_model_len: int,
        backend: str | None,
        draws: bool = False,
    ) -> None:
        """Start the engine.

        Args:
            student: the model.
            engine: how it is served.
            max_model_len: tokens of the longest prompt and completion, plus 1.
            backend: how new weights arrive: "object_store", or vLLM's "nccl" or "ipc"; None: never.
            draws: whether requests may ask for candidate draws, which every decoding step then looks out for.
        """
        self._backend = backend
        self._buffers: list[pa.Buffer] = []  # of the update under way
        self._draws = DrawFetcher(self._take_draws) if draws else None  # None: nothing draws
        self._engine = build_engine(
            student.model,
            student.trust_remote_code,
            engine,
            EngineRole(
                max_model_len=max_model_len,
                logprobs_mode="processed_logprobs",
                max_logprobs=NO_LIMIT,
                prefix_caching=True,
                tokenizer=True,
                priorities=True,
                weight_transfer_backend=backend,
                worker_extension=f"{DRAWS}.WorkerExtension",
                logits_processors=(f"{DRAWS}:DrawProcessor", f"{DRAWS}:DrawProcessorV2") if draws else None,
            ),
        )

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Draw one completion; a stop string's own tokens stay, for the student sampled them.

        Raises:
            RolloutError: vLLM refuses the request or gives it up.
            ActorDiedError: the engine's process is gone.
        """
        draws = self._draws_for(request_id, sampling)
        prompt = {"prompt_token_ids": [int(token) for token in prompt_ids]}
        is_finished = False
        try:
            params = _sampling_params(request_id, sampling, seed)
            with _told_as_death():
                outputs = [out async for out in self._engine.generate(prompt, params, request_id, priority=priority)]
            is_finished = True
        except (EngineGenerateError, VLLMClientError, ValueError) as error:
            raise RolloutError(f"request {request_id}: vLLM gave it up: {error}") from error
        finally:
            if draws and not is_finished:
                draws.give_up(request_id)
        completion = _completion(request_id, outputs[-1].outputs[0], sampling)
        return await _with_draws(draws, request_id, completion, sampling.num_candidates) if draws else completion

    @property
    def is_dead(self) -> bool:
        """Return whether the engine's process is gone."""
        return bool(self._engine.errored)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of the configured backend."""
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Pause, keeping running requests, whose keys and values are computed anew under the new weights."""
        # Clearing the caches here, while nothing runs, covers both running requests and shared prefixes: vLLM puts the
        # former back in its queue. A reset after the update would fail as long as a request holds a block.
        # vLLM's `pause_generation` does the same and then sleeps for 20 ms, so that outputs on their way reach their
        # callers before it returns. Nothing here waits for that: each output carries the label of its weights.
        with _told_as_death():
            await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
            await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket; for the object store, `update_info["buffer"]` holds its bytes."""
        if self._backend != OBJECT_STORE:
            await self._update_weights(update_info)
            return
        buffer = update_info["buffer"]
        # Until the update ends: vLLM may read a bucket once more when a later one completes a packed layer.
        self._buffers.append(buffer)
        with mappable(buffer) as region:
            described = {name: value for name, value in update_info.items() if name != "buffer"}
            await self._update_weights(described | asdict(region))

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights, resume, and return the checksum that every worker of this engine received.

        Raises:
            WeightSyncError: a parameter is missing, unknown or damaged, or the engine's workers disagree.
        """
        with _told_as_death():
            checksum = await self._install(policy_version)
            await self._engine.resume_generation()
        return checksum

    async def shutdown(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()

    async def _update_weights(self, update_info: dict[str, Any]) -> None:
        with _told_as_death():
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def _install(self, policy_version: int) -> str:
        if self._backend != OBJECT_STORE:
            await self._engine.finish_weight_update(weight_version=str(policy_version))
            return UNVERIFIED
        # Nothing runs yet, so the label may come before or after the weights; both are sent at once.
        reports, _ = await asyncio.gather(
            self._engine.collective_rpc("finish_and_report"),
            self._engine.update_weight_version(str(policy_version)),
        )
        self._buffers.clear()
        return common_checksum(reports, policy_version)

    def _draws_for(self, request_id: str, sampling: SamplingSettings) -> DrawFetcher | None:
        """Return whom to ask for a request's draws; None if it wants none."""
        if sampling.candidates != "draws" or not sampling.num_candidates:
            return None
        if self._draws is None:
            raise RolloutError(f"request {request_id} asks for draws, but its engine was started without them")
        return self._draws

    async def _take_draws(self, wanted: Mapping[str, int], given_up: list[str]) -> dict[str, Encoded]:
        # Every rank of the engine draws the same, for each samples on its own; all of them forget.
        [taken, *_] = await self._engine.collective_rpc("take_draws", args=(wanted, given_up))
        return {key: (ids, logprobs) for key, (ids, logprobs) in taken.items()}


@contextmanager
def _told_as_death() -> Iterator[None]:
    """Tell of a dead engine as of a dead actor, whose calls all end in the same error.

    Raises:
        ActorDiedError: the engine's process is gone.
    """
    try:
        yield
    except EngineDeadError as error:
        raise ActorDiedError("the process of a rollout engine is gone") from error


async def _with_draws(draws: DrawFetcher, request_id: str, completion: Completion, count: int) -> Completion:
    num_tokens = len(completion.token_ids)
    ids, logprobs = draws_from_bytes(*await draws.fetch(request_id, num_tokens), count)
    if len(ids) != num_tokens:
        raise RolloutError(f"request {request_id}: vLLM drew at {len(ids)} of its {num_tokens} tokens")
    return replace(completion, candidate_ids=ids, candidate_logprobs=logprobs)


def common_checksum(reports: Sequence[dict[str, Any]], policy_version: int) -> str:
    """Return the checksum that all tensor-parallel workers report.

    Raises:
        WeightSyncError: a worker reports a fault, or they received different bytes.
    """
    for rank, report in enumerate(reports):
        if report["fault"] is not None:
            raise WeightSyncError(f"weights of policy version {policy_version}, engine rank {rank}: {report['fault']}")
    checksums = {report["checksum"] for report in reports}
    if len(checksums) != 1:
        raise WeightSyncError(
            f"weights of policy version {policy_version}: the engine's ranks received different bytes, "
            f"with checksums {sorted(checksums)}"
        )
    return str(checksums.pop())


def _sampling_params(request_id: str, sampling: SamplingSettings, seed: int) -> SamplingParams:
    count, draws = sampling.num_candidates, sampling.candidates == "draws"
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_completion_tokens,
        seed=seed,
        stop=list(sampling.stop) or None,
        repetition_detection=_repetition_detection(sampling.stop_repetition),
        logprobs=0 if draws else count,  # besides the sampled token's
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=ask_for_draws(DrawOrder(request_id, count, seed)) if draws and count else None,
    )


def _repetition_detection(longest: int) -> RepetitionDetectionParams | None:
    """Look for passages of up to `longest` tokens; a shorter one is found as a passage that holds it several times."""
    if not longest:
        return None
    # Each length costs time at every token. Every length has a multiple in the upper half, and what repeats there is
    # long enough not to be a row of dashes.
    return RepetitionDetectionParams(max_pattern_size=longest, min_pattern_size=longest // 2 + 1, min_count=REPETITIONS)


def _completion(request_id: str, output: CompletionOutput, sampling: SamplingSettings) -> Completion:
    if output.finish_reason not in FINISH_REASONS:
        raise RolloutError(f"request {request_id}: vLLM ended it for the reason {output.finish_reason!r}")
    assert isinstance(output.logprobs, FlatLogprobs)
    num_listed = 0 if sampling.candidates == "draws" else sampling.num_candidates
    # By position: the written token, then the most likely ones, best first.
    ids = np.asarray(output.logprobs.token_ids, np.int32).reshape(-1, 1 + num_listed)
    logprobs = np.asarray(output.logprobs.logprobs, np.float32).reshape(-1, 1 + num_listed)
    return Completion(
        token_ids=np.asarray(output.token_ids, np.int32),
        logprobs=logprobs[:, 0],
        finish_reason=FINISH_REASONS[output.finish_reason],
        policy_versions=_policy_versions(output),
        candidate_ids=ids[:, 1:] if num_listed else None,
        candidate_logprobs=logprobs[:, 1:] if num_listed else None,
    )


def _policy_versions(output: CompletionOutput) -> Ints:
    """Return [completion_tokens]; vLLM keeps the label of the weights that wrote each token."""
    spans = output.weight_versions
    assert spans is not None  # only an engine that labels nothing has none
    versions = [0 if span.version == STARTED_WITH else int(span.version) for span in spans]
    return np.repeat(np.array(versions, np.int32), [span.end - span.start for span in spans])
