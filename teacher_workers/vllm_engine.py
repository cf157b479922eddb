"""The scoring engine on vLLM: a teacher's last hidden states over given tokens."""

from typing import Any

import torch
from vllm import PoolingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from cluster.contracts.config import TeacherConfig
from cluster.contracts.errors import ActorDiedError, ScoreError
from cluster.contracts.interfaces import HiddenStates
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
                prefix_caching=True,  # for the prompts that several trajectories share
                tokenizer=False,
                pooling=True,
            ),
        )

    @property
    def is_dead(self) -> bool:
        """Return whether the engine's process is gone."""
        return bool(self._engine.errored)

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> HiddenStates:
        """Return the hidden states after the final norm, on CPU, in the dtype that the engine runs in.

        Raises:
            ScoreError: vLLM gave the request up or returned another number of positions.
            ActorDiedError: the engine's process is gone.
        """
        first = int(loss_mask.argmax()) - 1  # the position that predicts the first completion token
        found, num_cached = await self._read(request_id, token_ids, use_cache=True)
        if num_cached > first:
            # Another trajectory began with the same completion tokens, or the prompt's cached blocks end where the
            # prompt does. vLLM returns no hidden states of cached positions.
            found, num_cached = await self._read(f"{request_id}-whole", token_ids, use_cache=False)
        return HiddenStates(predicting_rows(found, loss_mask, num_cached), num_cached)

    async def _read(self, request_id: str, token_ids: Ints, use_cache: bool) -> tuple[torch.Tensor, int]:
        """Return the hidden states of the positions that vLLM computed, and how many before them it had cached."""
        prompt: Any = {"prompt_token_ids": token_ids.tolist()}
        params = PoolingParams(
            task="token_embed",
            use_activation=False,  # it would normalise lengths to 1
            skip_reading_prefix_cache=not use_cache,
        )
        try:
            *_, output = [out async for out in self._engine.encode(prompt, params, request_id)]
        except EngineDeadError as error:
            raise ActorDiedError("the process of a teacher's engine is gone") from error
        except (EngineGenerateError, VLLMValidationError, ValueError) as error:
            raise ScoreError(f"vLLM could not score {len(token_ids)} tokens: {error}") from error
        return output.outputs.data, output.num_cached_tokens

    async def shutdown(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()
