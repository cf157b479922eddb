"""What `teacher_scoring` asks of vLLM; apart from it, because vLLM reads its environment when it is first imported."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from vllm import PoolingParams, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from cluster.config.stages import TeacherConfig
from cluster.contracts.columns import Ints, Ragged
from cluster.contracts.metrics import Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import Scores
from cluster.models.lm_head import LmHead
from cluster.models.token_scores import Layout, score_tokens
from cluster.vllm.engine import EngineRole, build_engine
from teacher_workers.backends.scored_rows import only_rows
from teacher_workers.backends.vllm import VllmBackend


class MeasuredEngine(VllmBackend):
    """The teacher's engine, which can also be asked for less."""

    async def prefill(self, sequences: Sequence[Ints]) -> None:
        """Read all tokens and return the last vector of each sequence."""
        params = PoolingParams(task="embed", use_activation=False, skip_reading_prefix_cache=True)
        await asyncio.gather(*(self._encode(ids, params) for ids in sequences))

    async def read_hidden(self, sequences: Sequence[Ints]) -> None:
        """Read all tokens and return all of their hidden states."""
        params = PoolingParams(task="token_embed", use_activation=False, skip_reading_prefix_cache=True)
        await asyncio.gather(*(self._encode(ids, params) for ids in sequences))

    async def forget(self) -> None:
        """Drop what was read, so that the same sequences are read anew."""
        assert self._engine is not None, "it never sleeps"
        await self._engine.reset_prefix_cache()

    async def hidden_states(self, ids: Ints) -> torch.Tensor:
        """Return the hidden states of all tokens."""
        return await self._encode(ids, PoolingParams(task="token_embed", use_activation=False))

    async def _encode(self, ids: Ints, params: PoolingParams) -> torch.Tensor:
        assert self._engine is not None, "it never sleeps"
        prompt: Any = {"prompt_token_ids": ids.tolist()}
        *_, output = [out async for out in self._engine.encode(prompt, params, _next_id(ids))]
        return output.outputs.data


class HeadInActor:
    """Scores as teachers did before their engines could: hidden states come to this process, which has the LM head."""

    def __init__(self, engine: MeasuredEngine, head: LmHead) -> None:
        self._engine, self._head = engine, head
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics]:
        token_ids, loss_mask = as_read_by(batch, request.model)
        states = await asyncio.gather(*(self._engine.hidden_states(token_ids[row]) for row in range(len(token_ids))))
        rows = [states[row][np.flatnonzero(loss_mask[row]) - 1] for row in range(len(states))]
        sampled = token_ids.values[loss_mask.values != 0]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, score_tokens, self._head, torch.cat(rows), sampled, request), {}


class RequestPerRow(MeasuredEngine):
    """Scores as teachers did before a batch was one request: every row is sent to the engine by itself."""

    def __init__(self, engine: MeasuredEngine) -> None:
        """Take an engine that runs."""
        self.__dict__ = engine.__dict__

    async def score_rows(self, token_ids: Ragged, positions: Ragged, ids: Ints, layout: Layout) -> tuple[Ragged, int]:
        of_rows = enumerate(np.split(ids, positions.offsets[1:-1]))
        asked = ((*only_rows(np.array([row]), token_ids, positions), own) for row, own in of_rows)
        score = super().score_rows
        answers, num_cached = zip(*await asyncio.gather(*(score(*row, layout) for row in asked)), strict=True)
        records = [answer.values for answer in answers]
        return Ragged(np.concatenate(records), np.cumsum([0, *map(len, records)])), sum(num_cached)


def build_generating_engine(teacher: TeacherConfig, max_model_len: int, top_k: int) -> AsyncLLM:
    """Start an engine that can score prompts by itself."""
    role = EngineRole(max_model_len=max_model_len, prefix_caching=False, tokenizer=False, max_logprobs=top_k)
    return build_engine(teacher.model, teacher.trust_remote_code, teacher.engine, role)


async def read_prompt_logprobs(engine: AsyncLLM, sequences: Sequence[Ints], top_k: int | None, is_flat: bool) -> None:
    """Let vLLM score all positions itself; flat lists are made arrays, dicts are left as they come."""
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=top_k,
        flat_logprobs=is_flat,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def read(ids: Ints) -> None:
        prompt: Any = {"prompt_token_ids": ids.tolist()}
        async for output in engine.generate(prompt, params, _next_id(ids)):
            if top_k is not None and is_flat:
                np.asarray(output.prompt_logprobs.logprobs, np.float32)
                np.asarray(output.prompt_logprobs.token_ids, np.int32)

    await asyncio.gather(*(read(ids) for ids in sequences))


def _next_id(ids: Ints) -> str:
    return f"measured-{id(ids)}"
