"""The scoring engine on vLLM: a teacher's log-probabilities of given tokens."""

import numpy as np
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from cluster.contracts.config import TeacherConfig
from cluster.contracts.errors import ScoreError
from cluster.contracts.trajectory import Bytes, Ints, TeacherScores
from cluster.vllm_runtime import EngineRole, build_engine
from teacher_workers.alignment import align


class VllmScoringEngine:
    """A ScoringEngine that runs one teacher in vLLM; build it inside a running event loop."""

    def __init__(self, teacher: TeacherConfig, max_model_len: int) -> None:
        """Start the engine; `max_model_len` counts the longest trajectory and the one token that vLLM must generate."""
        self._engine = build_engine(
            teacher.model,
            teacher.trust_remote_code,
            teacher.engine,
            EngineRole(
                max_model_len=max_model_len,
                logprobs_mode="raw_logprobs",
                max_logprobs=max(teacher.top_k, 1),
                prefix_caching=False,  # a cached position has no logits, so vLLM could not score it
                tokenizer=False,
            ),
        )

    @property
    def vocabulary_size(self) -> int:
        """Return the number of tokens that the model knows."""
        return int(self._engine.model_config.get_vocab_size())

    async def score(self, request_id: str, token_ids: Ints, loss_mask: Bytes, top_k: int) -> TeacherScores:
        """Score the positions whose loss_mask is 1; `top_k = 0` asks for the sampled tokens only.

        Raises:
            ScoreError: vLLM gave the request up or returned something that does not fit the tokens.
        """
        prompt = {"prompt_token_ids": token_ids.tolist()}
        try:
            outputs = [out async for out in self._engine.generate(prompt, _sampling_params(top_k), request_id)]
        except (EngineDeadError, EngineGenerateError, ValueError) as error:
            raise ScoreError(f"vLLM could not score {len(token_ids)} tokens: {error}") from error
        flat = outputs[-1].prompt_logprobs
        assert isinstance(flat, FlatLogprobs)
        return align(flat, token_ids, np.asarray(loss_mask), top_k)

    async def shutdown(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()


def _sampling_params(top_k: int) -> SamplingParams:
    # Everything about how scores are asked for stands here: where vLLM can start at a later position
    # (`prompt_logprob_start`) or score given ids (`prompt_logprob_token_ids`), both on GPU only, they belong here.
    return SamplingParams(
        max_tokens=1,  # vLLM cannot only read
        temperature=0.0,
        prompt_logprobs=top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
