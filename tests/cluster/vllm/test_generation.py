"""What vLLM answers, in our own terms."""

import numpy as np
import pytest
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput

from cluster.contracts.errors import RolloutError
from cluster.contracts.requests import SamplingSettings
from cluster.vllm.generation import read_completion, sampling_params

TWO_MOST_LIKELY = SamplingSettings(8, temperature=0.5, num_candidates=2)


def output_of(reason: str) -> CompletionOutput:
    """Return what vLLM says of tokens 7 and 2, each with its two most likely tokens."""
    ids, logprobs = [7, 9, 7, 2, 5, 6], [-2.0, -0.5, -2.0, -3.0, -0.25, -1.5]
    listed = FlatLogprobs([0, 3], [3, 6], ids, logprobs, [2, 1, 2, 9, 1, 2], [None] * 6)
    return CompletionOutput(0, "", [7, 2], None, listed, finish_reason=reason)


def test_every_candidate_keeps_its_own_log_probability_and_the_most_likely_is_first() -> None:
    completion = read_completion("0", output_of("stop"), np.array([3, 3], np.int32), TWO_MOST_LIKELY)
    assert completion.token_ids.tolist() == [7, 2]
    assert completion.logprobs.tolist() == [-2.0, -3.0]
    assert completion.candidate_ids is not None
    assert completion.candidate_logprobs is not None
    assert completion.candidate_ids.tolist() == [[9, 7], [5, 6]]
    assert completion.candidate_logprobs.tolist() == [[-0.5, -2.0], [-0.25, -1.5]]


def test_a_completion_that_ended_for_an_unknown_reason_is_an_error() -> None:
    with pytest.raises(RolloutError, match="request 0: vLLM ended it for the reason 'error'"):
        read_completion("0", output_of("error"), np.array([3, 3], np.int32), TWO_MOST_LIKELY)


def test_a_completion_ends_at_the_stop_ids_of_all_models() -> None:
    """The engine's own settings name 2; vLLM adds them to the request's."""
    params = sampling_params(SamplingSettings(8, 1.0, stop_token_ids=(7, 9)), seed=5)
    params.update_from_generation_config({"eos_token_id": [2, 3]}, eos_token_id=2)
    assert {*params.stop_token_ids, params.eos_token_id} == {2, 3, 7, 9}


def test_a_request_says_the_temperature_and_the_seed_once() -> None:
    params = sampling_params(TWO_MOST_LIKELY, seed=5)
    assert (params.temperature, params.seed, params.max_tokens, params.logprobs) == (0.5, 5, 8, 2)
