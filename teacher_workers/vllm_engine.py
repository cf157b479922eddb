"""The scoring engine on vLLM: a teacher's last hidden states over given tokens."""

from typing import Any

import torch
from vllm import PoolingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from cluster.contracts.config import TeacherConfig
from cluster.contracts.errors import ScoreError
from cluster.contracts.trajectory import Bytes, Ints
from cluster.vllm_runtime import EngineRole, build_engine
from teacher_workers.scoring import predicting_rows


class VllmScoringEngine:
    """A ScoringEngine that runs one teacher in vLLM; build it inside a running event loop."""

    def __init__(self, teacher: TeacherConfig, max_model_len: int) -> None:
        """Start the engine; `max_model_len` is at least the tokens of the longest trajectory."""
        self._engine = build_engine(
            teacher.model,
            teacher.trust_remote_code,
            teacher.engine,
            EngineRole(
                max_model_len=max_model_len,
                prefix_caching=False,  # a cached position has no hidden state, so vLLM could not return it
                tokenizer=False,
                pooling=True,
            ),
        )

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        """Return [completion_tokens, width]: after the final norm, on CPU, in the dtype that the engine runs in.

        Raises:
            ScoreError: vLLM gave the request up or returned another number of positions.
        """
        prompt: Any = {"prompt_token_ids": token_ids.tolist()}
        params = PoolingParams(task="token_embed", use_activation=False)  # the activation would normalise lengths to 1
        try:
            outputs = [out async for out in self._engine.encode(prompt, params, request_id)]
        except (EngineDeadError, EngineGenerateError, VLLMValidationError, ValueError) as error:
            raise ScoreError(f"vLLM could not score {len(token_ids)} tokens: {error}") from error
        return predicting_rows(outputs[-1].outputs.data, loss_mask)

    async def shutdown(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()
