"""Scores with a language model that vLLM runs: its worker scores a batch's tokens, and sends one record per token.

vLLM is imported where it is used: the driver asks the class for facts about the model and must not load it.
"""

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config.stages import TeacherConfig
from cluster.contracts.columns import Ints, Ragged
from cluster.contracts.errors import ActorDiedError, ConfigError, ModelError, ScoreError
from cluster.contracts.metrics import Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import Scores
from cluster.models.hidden_layers import load_bank, paired_layers
from cluster.models.lm_head import read_head_facts
from cluster.models.model_checks import ModelFacts, read_model
from cluster.models.model_files import load_model_config
from cluster.models.token_scores import Layout
from cluster.models.weight_files import fingerprint
from cluster.vllm.engine import EngineRole, LayersToSend, build_engine
from cluster.vllm.token_scoring import SCORING_CALLS, Scoring, batch_request, unpack_answer
from cluster.vllm.weight_sync.updates import EngineUpdates
from cluster.weight_sync.transports import TEACHER_TRANSPORT, vllm_backend
from teacher_workers.backends.scored_rows import ScoredRowsBackend

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class VllmBackend(ScoredRowsBackend):
    """Runs one teacher in vLLM.

    Engines on GPUs sleep by vLLM's sleep mode; those on CPUs, which have none, end and start again.
    """

    signals = ScoredRowsBackend.signals | {"layers"}
    can_generate = True
    takes_weights = True

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Start the engine; raise ModelError if that fails."""
        head = read_head_facts(teacher.model, teacher.trust_remote_code, teacher.excluded_token_ids, teacher.stop_class)
        layers = layers_to_send(teacher)
        width = 0 if layers is None else len(layers.layers) * sent_width(layers, head.width)
        super().__init__(head, teacher.engine.dtype, width)
        self._teacher = teacher
        self._role = EngineRole(
            max_model_len=max_model_len,
            prefix_caching=True,  # for the prompts that several trajectories share
            tokenizer=False,
            scoring=Scoring(head, layers),
            sleeps=sleeps,
            weight_transfer_backend=vllm_backend(TEACHER_TRANSPORT) if teacher.is_refreshed else None,
            worker_extension=SCORING_CALLS,
        )
        self._num_requests = 0
        self._has_shared_ids = False  # the engine that runs now
        self._engine: AsyncLLM | None = self._build()  # None: it sleeps where engines have no sleep mode

    @classmethod
    def check(cls, teacher: TeacherConfig, student: ModelFacts) -> ModelFacts:
        if not teacher.engine.tensor_parallel:
            raise ConfigError("engine.tensor_parallel = 0 is for teachers whose backend needs no GPU; vLLM takes 1")
        return read_model(teacher, is_student=False)

    @classmethod
    def identity(cls, teacher: TeacherConfig) -> str:
        """Return the files' fingerprint; of a teacher whose states are projected, with the hash of the bank."""
        layers = layers_to_send(teacher)
        bank = "" if layers is None or layers.bank is None else f"-bank-{layers.digest}"
        return f"{fingerprint(teacher.model)}{bank}"

    @property
    def is_dead(self) -> bool:
        """Return whether the engine's process is gone, other than by sleeping."""
        return self._engine is not None and bool(self._engine.errored)

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics]:
        if self.shared_ids is not None and not self._has_shared_ids:
            assert self._engine is not None, "no score is requested of a sleeping engine"
            await self._engine.collective_rpc("set_shared_ids", args=(self.shared_ids.tobytes(),))
            self._has_shared_ids = True
        return await super().score(batch, request)

    async def score_rows(self, token_ids: Ragged, positions: Ragged, ids: Ints, layout: Layout) -> tuple[Ragged, int]:
        """Let vLLM read the rows and score the tokens at some positions.

        Raises:
            ScoreError: a row is longer than the engine's context, or vLLM gave the request up.
            ActorDiedError: the engine's process is gone.
        """
        longest = int(token_ids.lengths.max())
        if longest > self._role.max_model_len:
            raise ScoreError(
                f"vLLM could not score {longest} tokens: its context has {self._role.max_model_len}; the run file's "
                "lengths of prompt, completion and observations must hold all that is scored"
            )
        # A student with more tokens may write one that the teacher has no embedding of, which would end vLLM's process.
        known = Ragged(np.minimum(token_ids.values, self._head.vocabulary_size - 1), token_ids.offsets)
        return unpack_answer(await self._ask(batch_request(known, positions, ids, layout)), len(token_ids))

    async def sleep(self) -> None:
        """Give the hardware back: weights go to host memory, the cache is dropped; without a sleep mode, all ends."""
        from vllm.platforms import current_platform

        if self._engine is None:
            return
        if current_platform.is_sleep_mode_available():
            await self._engine.sleep(level=1)
        else:
            self._engine.shutdown()
            self._engine = None

    async def wake(self) -> None:
        if self._engine is not None:
            await self._engine.wake_up()
        else:
            # In a thread, for it takes seconds in which the actor must give signs of life.
            self._engine = await asyncio.to_thread(self._build)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self._updates.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        assert self._engine is not None, "engines that take weights share their hardware with no other"
        self._updates = EngineUpdates(self._engine, "teacher")
        await self._updates.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self._updates.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> str:
        checksum = await self._updates.install(policy_version)
        await self._updates.resume()
        return checksum

    async def shutdown(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()

    async def _ask(self, wanted: dict[str, Any]) -> NDArray[np.uint8]:
        """Return the engine's answer to one request, which `cluster/vllm/batch_requests.py` takes apart there."""
        from vllm import PoolingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        assert self._engine is not None, "no score is requested of a sleeping engine"
        self._num_requests += 1
        prompt: Any = {"prompt_token_ids": [0]}  # vLLM wants one; the rows are in the parameters
        # An activation would normalise lengths to 1.
        params = PoolingParams(task="token_embed", use_activation=False, extra_kwargs=wanted)
        try:
            *_, output = [out async for out in self._engine.encode(prompt, params, str(self._num_requests))]
        except EngineDeadError as error:
            raise ActorDiedError("the process of a teacher's engine is gone") from error
        except (EngineGenerateError, VLLMValidationError, ValueError) as error:
            raise ScoreError(f"vLLM could not score a batch: {error}") from error
        answer: NDArray[np.uint8] = output.outputs.data.numpy()
        return answer

    def _build(self) -> "AsyncLLM":
        self._has_shared_ids = False
        teacher = self._teacher
        return build_engine(teacher.model, teacher.trust_remote_code, teacher.engine, self._role)


def layers_to_send(teacher: TeacherConfig) -> LayersToSend | None:
    """Return which of its own layers a teacher sends; raise ModelError if its bank is missing or of another model."""
    states = teacher.states
    if states is None:
        return None
    depth = load_model_config(teacher.model, teacher.trust_remote_code).get_text_config().num_hidden_layers
    if states.bank is None:
        return LayersToSend(paired_layers(states.layers, states.student_depth, depth))
    bank = load_bank(states.bank, states.digest)
    if bank.depths["teacher"] != depth:
        raise ModelError(
            f"projection bank '{states.bank}': was fitted for a teacher of {bank.depths['teacher']} layers, "
            f"'{teacher.model}' has {depth}; fit one for it with `preceptor fit-projection`"
        )
    return LayersToSend(bank.select(states.layers).layers["teacher"], states.bank, bank.digest)


def sent_width(layers: LayersToSend, model_width: int) -> int:
    """Return how many values a teacher of this width sends of each layer."""
    return model_width if layers.bank is None else load_bank(layers.bank).rank
