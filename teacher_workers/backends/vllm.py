"""The scoring engine on vLLM: a teacher's last hidden states over given tokens."""

import asyncio
from typing import Any

import torch
from vllm import PoolingParams
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ActorDiedError, ScoreError
from cluster.contracts.requests import HiddenStates
from cluster.contracts.trajectory import Bytes, Ints
from cluster.vllm.engine import EngineRole, build_engine
from teacher_workers.backends.lm_head_scores import predicting_rows


class VllmScoringEngine:
    """A ScoringEngine that runs one teacher in vLLM; build it inside a running event loop.

    Engines on GPUs sleep by vLLM's sleep mode; those on CPUs, which have none, end and start again.
    """

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Start the engine.

        Args:
            teacher: its model, and how it is served.
            max_model_len: at least the tokens of the longest trajectory.
            sleeps: whether `sleep` and `wake` will be called.
        """
        self._teacher = teacher
        self._role = EngineRole(
            max_model_len=max_model_len,
            prefix_caching=True,  # for the prompts that several trajectories share
            tokenizer=False,
            pooling=True,
            sleeps=sleeps,
        )
        self._engine: AsyncLLM | None = self._build()  # None: it sleeps where engines have no sleep mode

    @property
    def is_dead(self) -> bool:
        """Return whether the engine's process is gone, other than by sleeping."""
        return self._engine is not None and bool(self._engine.errored)

    async def sleep(self) -> None:
        """Give the hardware back: weights go to host memory, the cache is dropped; without a sleep mode, all ends."""
        if self._engine is None:
            return
        if current_platform.is_sleep_mode_available():
            await self._engine.sleep(level=1)
        else:
            self._engine.shutdown()
            self._engine = None

    async def wake(self) -> None:
        """Take the hardware again.

        Raises:
            ModelError: the engine does not start again.
        """
        if self._engine is not None:
            await self._engine.wake_up()
            return
        # In a thread, for it takes seconds in which the actor must give signs of life.
        self._engine = await asyncio.to_thread(self._build)

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
        assert self._engine is not None, "a sleeping engine is asked nothing"
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
        if self._engine is not None:
            self._engine.shutdown()

    def _build(self) -> AsyncLLM:
        return build_engine(self._teacher.model, self._teacher.trust_remote_code, self._teacher.engine, self._role)
