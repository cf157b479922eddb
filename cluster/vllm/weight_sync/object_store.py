"""Receives weights through Ray's object store, in a weight-transfer engine that vLLM runs beside the model.

vLLM's worker is no Ray process and cannot fetch an object, so the rollout actor passes where each bucket can be mapped;
the receiver maps it, checks it, decodes it by the payload, and loads whole parameters into the model: vLLM repacks
weights for its kernels, so nothing can be changed in place there.

A fault is recorded instead of raised: an exception here would reach the actor as text without a class, and would leave
vLLM's update half open. `WorkerExtension.finish_and_report` passes the outcome to the actor.
"""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from cluster.vllm.weight_sync.loading import (
    fault_of_incomplete,
    missing_parameters,
    repack_tied,
    return_expert_kernels,
    take_expert_kernels,
    tied_layers,
)
from cluster.weight_sync.manifest import Bucket, Bytes, TensorSpec, checksum, new_digest
from cluster.weight_sync.transports import Encoded, Payload, make_payload

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Says nothing: there is nothing to open."""


@dataclass
class BucketMessage(WeightTransferUpdateInfo):
    """Says where a bucket lies and how to read it."""

    names: list[str]  # as in the Hugging Face checkpoint
    dtypes: list[str]  # keys of TORCH_DTYPES
    shapes: list[list[int]]
    checksum: str  # of all the update's values to the end of this bucket; with `fields`: of the bytes that travel
    path: str  # names the memory while the actor holds it
    num_bytes: int
    offset: int = 0  # of the bytes in the file
    payload: str = "full"  # a name of PAYLOADS, or an import path
    fields: dict[str, Any] = field(default_factory=dict)  # what the payload decodes by; empty: values as they are
    base_version: int | None = None  # policy version on which the payload builds; None: on none
    kept_as: int | None = None  # policy version as which an incremental payload keeps the values; None: it keeps none

    @property
    def bucket(self) -> Bucket:
        described = zip(self.names, self.shapes, self.dtypes, strict=True)
        return [TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in described]


class ObjectStoreReceiver(WeightTransferEngine[InitInfo, BucketMessage]):
    """Loads buckets of checkpoint-format parameters from shared memory."""

    init_info_cls = InitInfo
    update_info_cls = BucketMessage

    def __init__(self, *arguments: Any) -> None:  # what vLLM's releases pass differs; all end with the model
        super().__init__(*arguments)
        # Read before the first update: while one runs, vLLM gives tied layers parameters of their own.
        self._model_names = {name for name, _ in self.model.named_parameters()}
        self._tied_layers = tied_layers(self.model)
        self._decoders: dict[str, Payload] = {}  # by the payload's name
        self._kept_version: int | None = None  # of what an incremental payload keeps
        self.begin()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Do nothing: every bucket says where it is."""

    def begin(self) -> None:
        self._digest = new_digest()
        self._faults: list[str] = []
        self._received_names: set[str] = set()  # Hugging Face names
        self._loaded_names: set[str] = set()  # vLLM names
        self._loading: str | None = None  # the tensor that the model has taken last
        self._incomplete: str | None = None
        self._expert_kernels: list[tuple[Any, Any]] = []
        self._arriving_version: int | None = None

    def start_weight_update(self) -> None:
        """Make the model's layers take checkpoint-format parameters again, as when it was first loaded."""
        self._expert_kernels = take_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)  # vLLM 0.24 does this itself, and finishes itself

    def receive_weights(self, update_info: BucketMessage, load_weights: Callable[..., Any] | None = None) -> None:
        """Check one bucket and load it; after a fault, leave the rest of the update alone.

        `load_weights` is the model's own; only vLLM 0.24 passes it.
        """
        memory = map_memory(update_info)
        fault = self._fault_of(update_info, memory)
        if fault is not None:
            self._faults.append(fault)
        if self._faults:
            return
        self._arriving_version = update_info.kept_as
        self._received_names.update(update_info.names)
        try:
            self._loaded_names.update(self.model.load_weights(self._parameters(update_info, memory)) or ())
        # An unknown name or a wrong shape; and what a payload of a user's own may raise.
        except (LookupError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            self._faults.append(f"the model does not take '{self._loading}': {reason_of(error)}")

    def finish_weight_update(self) -> None:
        """Look for layers that are not full, before vLLM makes do with what they have."""
        self._incomplete = fault_of_incomplete(self.model, self._tied_layers)
        finalize_layerwise_reload(self.model, self.model_config)
        return_expert_kernels(self._expert_kernels)

    def end(self) -> dict[str, Any]:
        """Check that all parameters came, repack what the layerwise reload leaves out, and return the outcome.

        Returns:
            "checksum" of all values of all parameters, in order; "fault": a sentence, or None when all arrived intact.
        """
        if not self._faults:
            packed = getattr(self.model, "packed_modules_mapping", {})
            missing = missing_parameters(self._model_names, self._loaded_names, self._received_names, packed)
            if missing:
                self._faults.append(f"the update lacks {', '.join(missing)}")
            elif self._incomplete is not None:
                self._faults.append(self._incomplete)
        self._kept_version = None if self._faults else self._arriving_version
        if self._kept_version is None:
            self._decoders.clear()
        repack_tied(self._tied_layers)
        return {"checksum": self._digest.hexdigest(), "fault": self._faults[0] if self._faults else None}

    def shutdown(self) -> None:
        """Do nothing: nothing stays open."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Refuse: vLLM 0.24 wants the sending end here, and ours is the learner's."""
        raise NotImplementedError

    def _fault_of(self, message: BucketMessage, memory: Bytes) -> str | None:
        if message.fields:
            received = checksum([memory])
        else:  # of values as they are one digest says both: no byte is read twice
            self._digest.update(memory.data)
            received = self._digest.hexdigest()
        if received != message.checksum:
            return f"the bucket that starts with {message.names[0]} was damaged on its way"
        if message.base_version is not None and message.base_version != self._kept_version:
            held = "none" if self._kept_version is None else f"version {self._kept_version}"
            return f"changes since policy version {message.base_version} arrived where {held} is kept"
        return None

    def _parameters(self, message: BucketMessage, memory: Bytes) -> Iterator[tuple[str, torch.Tensor]]:
        bucket = message.bucket
        decoder = self._decoders.get(message.payload) or make_payload(message.payload)
        self._decoders[message.payload] = decoder
        for tensor, values in zip(bucket, decoder.decode(bucket, Encoded(memory, message.fields)), strict=True):
            if message.fields:
                self._digest.update(values.data)
            self._loading = tensor.name
            yield tensor.name, torch.from_numpy(values).view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


def reason_of(error: Exception) -> str:
    """Return the first sentence of what a model says of a tensor; vLLM goes on with all names that the model has."""
    return str(error).strip().split("\n")[0].split(". The available parameters")[0] or type(error).__name__


def map_memory(message: BucketMessage) -> Bytes:
    """Return the bucket's bytes, mapped for as long as a view of them lives.

    vLLM keeps the views of a packed layer until its last part arrives, which may be in a later bucket.
    """
    skipped = message.offset % mmap.ALLOCATIONGRANULARITY  # a mapping begins at a page
    with Path(message.path).open("rb") as shared:
        # A private mapping is writable for torch's sake; nothing writes, so no page is ever copied.
        memory = mmap.mmap(
            shared.fileno(), skipped + message.num_bytes, access=mmap.ACCESS_COPY, offset=message.offset - skipped
        )
    return np.frombuffer(memory, np.uint8)[skipped:]
