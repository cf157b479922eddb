"""Scores with a language model that vLLM runs: vLLM returns the last hidden states, and our LM head reads them.

vLLM is imported where it is used: the driver asks the class for facts about the model and must not load it.
"""

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ActorDiedError, ConfigError, ModelError, ScoreError
from cluster.contracts.trajectory import Bytes, Ints
from cluster.models.hidden_layers import load_bank, paired_layers
from cluster.models.lm_head import load_teacher_head
from cluster.models.model_checks import ModelFacts, read_model
from cluster.models.model_files import load_model_config
from cluster.models.weight_files import fingerprint
from cluster.vllm.engine import EngineRole, LayersToSend, build_engine
from cluster.vllm.weight_sync.updates import UPDATE_CALLS, EngineUpdates
from cluster.weight_sync.transports import TEACHER_TRANSPORT, vllm_backend
from teacher_workers.backends.arriving_head import ArrivingHead
from teacher_workers.backends.lm_head_scores import HiddenStatesBackend, predicting_rows

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class VllmBackend(HiddenStatesBackend):
    """Runs one teacher in vLLM.

    Engines on GPUs sleep by vLLM's sleep mode; those on CPUs, which have none, end and start again.
    """

    signals = HiddenStatesBackend.signals | {"layers"}
    can_generate = True
    takes_weights = True

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Read the LM head and start the engine; raise ModelError if that fails."""
        head = load_teacher_head(teacher)
        layers = layers_to_send(teacher)
        self._teacher = teacher
        self._role = EngineRole(
            max_model_len=max_model_len,
            prefix_caching=True,  # for the prompts that several trajectories share
            tokenizer=False,
            pooling=True,
            layers=layers,
            sleeps=sleeps,
            weight_transfer_backend=vllm_backend(TEACHER_TRANSPORT) if teacher.is_refreshed else None,
            worker_extension=UPDATE_CALLS if teacher.is_refreshed else None,
        )
        self._arriving_head = ArrivingHead()
        self._engine: AsyncLLM | None = self._build()  # None: it sleeps where engines have no sleep mode
        # After the engine has taken its share of the GPU's memory: head and logits live in what gpu_memory_fraction
        # leaves free.
        width = 0 if layers is None else len(layers.layers) * sent_width(layers, head.weight.shape[1])
        super().__init__(head.to("cuda" if torch.cuda.is_available() else "cpu"), width)

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

    async def sleep(self) -> None:
        """Give the hardware back: weights go to host memory, the cache is dropped; without a sleep mode, all ends."""
        from vllm.platforms import current_platform

        self.move_head("cpu")
        torch.cuda.empty_cache()  # else torch keeps the head's memory for this process; does nothing without a GPU
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
        self.move_head("cuda" if torch.cuda.is_available() else "cpu")

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self._updates.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        assert self._engine is not None, "engines that take weights share their hardware with no other"
        self._updates = EngineUpdates(self._engine, "teacher")
        await self._updates.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        self._arriving_head.read(self._head, update_info)
        await self._updates.update_weights(update_info)

    async def finish_weight_update(self, policy_version: int) -> str:
        checksum = await self._updates.install(policy_version)
        self._head = self._arriving_head.install(self._head)
        await self._updates.resume()
        return checksum

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        """Return the hidden states after the final norm, on CPU, in the dtype that the engine runs in.

        Raises:
            ScoreError: vLLM gave the request up or returned another number of positions.
            ActorDiedError: the engine's process is gone.
        """
        first = int(loss_mask.argmax()) - 1  # the position that predicts the first sampled token
        # A student with more tokens may write one that the teacher has no embedding of, which would end vLLM's process.
        token_ids = np.minimum(token_ids, self._head.vocabulary_size - 1)
        states, num_cached = await self._read(request_id, token_ids, use_cache=True)
        if num_cached > first:
            # Another trajectory began with the same completion tokens, or the prompt's cached blocks end where the
            # prompt does. vLLM returns no hidden states of cached positions.
            states, num_cached = await self._read(f"{request_id}-whole", token_ids, use_cache=False)
        return predicting_rows(states, loss_mask, num_cached), num_cached

    async def shutdown(self) -> None:
        await super().shutdown()
        if self._engine is not None:
            self._engine.shutdown()

    async def _read(self, request_id: str, token_ids: Ints, use_cache: bool) -> tuple[torch.Tensor, int]:
        """Return the hidden states of the positions that vLLM computed, and how many before them it had cached."""
        from vllm import PoolingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        assert self._engine is not None, "no score is requested of a sleeping engine"
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

    def _build(self) -> "AsyncLLM":
        return build_engine(self._teacher.model, self._teacher.trust_remote_code, self._teacher.engine, self._role)


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
