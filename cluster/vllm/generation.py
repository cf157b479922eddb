"""Samples completions in a vLLM engine, and lets an engine that samples score given tokens; both in our own terms."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RepetitionDetectionParams
from vllm.v1.engine.exceptions import EngineGenerateError

from cluster.contracts.errors import RolloutError, ScoreError
from cluster.contracts.requests import Completion, SamplingSettings
from cluster.contracts.trajectory import FinishReason, Floats, Ints
from cluster.vllm.compat import OUTPUT_KIND, TokenVersions, VLLMClientError
from cluster.vllm.stop_class_processor import request_merging
from cluster.vllm.weight_sync.updates import raised_as_death

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

OURS = "environment_error"
FINISH_REASONS: dict[str, FinishReason] = {one: one for one in get_args(FinishReason) if one != OURS}  # vLLM's
REPETITIONS = 4  # of a passage, one after the other, that end a completion
NO_LIMIT = -1  # of log-probabilities per token, to vLLM
NEVER = -100.0  # added to a logit; vLLM takes no lower one
STOPS = "cluster.vllm.stop_class_processor"
MERGING = (f"{STOPS}:StopClassProcessor", f"{STOPS}:StopClassProcessorV2")  # of an engine with a class of stop ids


async def generate(
    engine: "AsyncLLM",
    owner: str,
    request_id: str,
    prompt_ids: Sequence[int],
    sampling: SamplingSettings,
    seed: int,
    priority: int = 0,
    policy_version: Callable[[], int] = lambda: 0,
    extra: Mapping[str, Any] | None = None,
    excluded: Sequence[int] = (),
) -> Completion:
    """Sample one completion; a stop string's own tokens stay, for the model sampled them.

    Args:
        owner: whose engine it is, in errors.
        policy_version: of the engine's weights.
        extra: for logits processors of the engine's own.
        excluded: tokens that are never sampled.

    Raises:
        RolloutError: vLLM refuses the request or gives it up.
        ActorDiedError: the engine's process is gone.
    """
    versions, prompt = TokenVersions(), {"prompt_token_ids": [int(token) for token in prompt_ids]}
    try:
        params = sampling_params(sampling, seed, extra, excluded)
        with raised_as_death(owner):
            async for request in engine.generate(prompt, params, request_id, priority=priority):
                [output] = request.outputs
                versions.add(output, policy_version())
    except (EngineGenerateError, VLLMClientError, ValueError) as error:
        raise RolloutError(f"request {request_id}: vLLM gave it up: {error}") from error
    return read_completion(request_id, output, versions.of(output), sampling)


async def prompt_logprobs(
    engine: "AsyncLLM", owner: str, request_id: str, token_ids: Ints, places: Ints, count: int, priority: int
) -> tuple[Ints, Floats]:
    """Score given tokens as `RolloutEngine.prompt_logprobs` has it; vLLM leaves its prefix cache out of it.

    Raises:
        ScoreError: vLLM refuses the request or gives it up.
        ActorDiedError: the engine's process is gone.
    """
    prompt: Any = {"prompt_token_ids": token_ids.tolist()}
    try:
        with raised_as_death(owner):
            scored = engine.generate(prompt, scoring_params(count), request_id, priority=priority)
            *_, request = [output async for output in scored]
    except (EngineGenerateError, VLLMClientError, ValueError) as error:
        raise ScoreError(f"vLLM could not score {len(token_ids)} tokens: {error}") from error
    return read_prompt_logprobs(request, places, count)


def sampling_params(
    sampling: SamplingSettings, seed: int, extra: Mapping[str, Any] | None = None, excluded: Sequence[int] = ()
) -> SamplingParams:
    count, is_sampled = sampling.num_candidates, sampling.candidates == "sampled"
    merged = request_merging(sampling.stop_class) if len(sampling.stop_class) > 1 else {}
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_completion_tokens,
        seed=seed,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        repetition_detection=_repetition_detection(sampling.stop_repetition),
        logprobs=0 if is_sampled else count,  # besides the sampled token's
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=OUTPUT_KIND,
        logit_bias=dict.fromkeys(excluded, NEVER) or None,
        extra_args={**merged, **(extra or {})} or None,
        skip_clone=True,  # they are of one request, and vLLM's deep copy takes longer than making them
    )


def scoring_params(count: int) -> SamplingParams:
    """List every prompt token and the `count` most likely ones; vLLM also samples one token, which is of no use."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=count,
        flat_logprobs=True,
        detokenize=False,
        output_kind=OUTPUT_KIND,
        skip_clone=True,
    )


def read_prompt_logprobs(request: RequestOutput, places: Ints, count: int) -> tuple[Ints, Floats]:
    """Return ids and log-probabilities at some places of the prompt, [places, 1 + count]: the token's own, the best."""
    listed = request.prompt_logprobs
    assert isinstance(listed, FlatLogprobs)
    shape = (-1, 1 + count)  # nothing is said of the prompt's first token
    ids = np.asarray(listed.token_ids, np.int32).reshape(shape)
    logprobs = np.asarray(listed.logprobs, np.float32).reshape(shape)
    return ids[places - 1], logprobs[places - 1]


def _repetition_detection(longest: int) -> RepetitionDetectionParams | None:
    """Look for passages of up to `longest` tokens; a longer passage that holds a shorter one several times shows it."""
    if not longest:
        return None
    # Each length costs time at every token. Every length has a multiple in the upper half, and what repeats there is
    # long enough not to be a row of dashes.
    return RepetitionDetectionParams(max_pattern_size=longest, min_pattern_size=longest // 2 + 1, min_count=REPETITIONS)


def read_completion(
    request_id: str, output: CompletionOutput, policy_versions: Ints, sampling: SamplingSettings
) -> Completion:
    """Return the completion that vLLM sampled; raise RolloutError if it ended for a reason that is none of ours."""
    if output.finish_reason not in FINISH_REASONS:
        raise RolloutError(f"request {request_id}: vLLM ended it for the reason {output.finish_reason!r}")
    assert isinstance(output.logprobs, FlatLogprobs)
    num_listed = 0 if sampling.candidates == "sampled" else sampling.num_candidates
    # By position: the sampled token, then the most likely ones, best first.
    ids = np.asarray(output.logprobs.token_ids, np.int32).reshape(-1, 1 + num_listed)
    logprobs = np.asarray(output.logprobs.logprobs, np.float32).reshape(-1, 1 + num_listed)
    return Completion(
        token_ids=np.asarray(output.token_ids, np.int32),
        logprobs=logprobs[:, 0],
        finish_reason=FINISH_REASONS[output.finish_reason],
        policy_versions=policy_versions,
        candidate_ids=ids[:, 1:] if num_listed else None,
        candidate_logprobs=logprobs[:, 1:] if num_listed else None,
    )
