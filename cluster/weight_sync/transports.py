"""Names what of the weights travels (payloads) and how (transports), and chooses one of each for a run.

Importing this loads neither torch nor vLLM: the tables hold import paths, which are loaded where the classes run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cluster.contracts.errors import ConfigError, PlacementError
from cluster.contracts.import_path import is_import_path, load_object
from cluster.weight_sync.manifest import Bucket, Bytes, places

if TYPE_CHECKING:
    from cluster.config.run_config import Config


@dataclass(frozen=True)
class Encoded:
    """A bucket as it travels."""

    memory: Bytes  # at least one byte
    fields: Mapping[str, Any] = field(default_factory=dict)  # what `decode` needs, plain values; empty: values as is
    num_changed: int | None = None  # values that differ from those of the last update, where that is known


class Payload(Protocol):
    """Turns a bucket's values into what travels, and back; only the object store takes another one than `full`.

    Rank 0 of the learner and every rank of a rollout engine build one object each, without arguments. Buckets come in
    the same order, with the same tensors, in every update.
    """

    is_incremental: bool  # what travels applies to the weights that arrived before, of which both ends keep a copy

    def encode(self, bucket: Bucket, values: Bytes, has_base: bool) -> Encoded:
        """Return what travels in place of a bucket's values.

        Args:
            bucket: the tensors.
            values: theirs, one after the other. What is to arrive may differ: `encode` then writes it here. The
                checksum is of that, and so is what goes to a worker that cannot decode because it has no base.
            has_base: whether the update before this one succeeded; without, an incremental payload sends values as is.
        """

    def decode(self, bucket: Bucket, encoded: Encoded) -> Iterator[Bytes]:
        """Yield every tensor's bytes, which must stay as they are until the update ends; an error makes it fail."""


class FullPayload:
    """Sends every value as it is."""

    is_incremental = False

    def encode(self, bucket: Bucket, values: Bytes, has_base: bool) -> Encoded:
        return Encoded(values)

    def decode(self, bucket: Bucket, encoded: Encoded) -> Iterator[Bytes]:
        return (encoded.memory[place] for _, place in places(bucket))


PAYLOADS: dict[str, str] = {
    "full": "cluster.weight_sync.transports:FullPayload",
    "delta": "cluster.weight_sync.delta:DeltaPayload",
}


@dataclass(frozen=True)
class Transport:
    """The two ends of a way from the learner to the rollout engines."""

    sender: str  # function of a TrainEngine and the Config that returns a WeightSender, in each rank of the learner
    receiver: str  # WeightTransferEngine with `begin` and `end`, which vLLM loads in each rank of a rollout engine


TRANSPORTS: dict[str, Transport] = {
    "object_store": Transport(
        sender="learner.weight_sync.object_store:make_sender",
        receiver="cluster.vllm.weight_sync.object_store:ObjectStoreReceiver",
    ),
    "nccl": Transport(
        sender="learner.weight_sync.gpu_sender:make_nccl_sender",
        receiver="cluster.vllm.weight_sync.nccl_and_ipc:NcclReceiver",
    ),
    "ipc": Transport(
        sender="learner.weight_sync.gpu_sender:make_ipc_sender",
        receiver="cluster.vllm.weight_sync.nccl_and_ipc:IpcReceiver",
    ),
}


# To teachers, which may be on other nodes than the learner and come and go: no group of GPUs waits for them.
TEACHER_TRANSPORT = "object_store"


def vllm_backend(transport: str) -> str:
    """Return the name under which vLLM knows a transport's receiver; vLLM's own are called `nccl` and `ipc` too."""
    return f"preceptor_{transport}"


def make_payload(name: str) -> Payload:
    """Build one end of a payload."""
    payload: Payload = load_object(PAYLOADS.get(name, name), "weight_sync.payload")()
    return payload


def choose(config: "Config", on_gpu: bool) -> tuple[str, str]:
    """Return the run's payload and transport: as set, else the fastest transport between the run's workers.

    Choosing again from a configuration that holds the choice changes nothing.

    Raises:
        ConfigError: there is no such payload, or the transport does not take it.
        PlacementError: what is set cannot work there.
    """
    payload, transport, shared = config.weight_sync.payload, config.weight_sync.transport, config.ray.share_gpu
    if payload not in PAYLOADS and not is_import_path(payload):
        raise ConfigError(f"weight_sync.payload = '{payload}' is none of {list(PAYLOADS)} and no package.module:Class")
    make_payload(payload)
    if transport == "auto":
        fastest = "ipc" if shared else "nccl"
        return payload, fastest if on_gpu and payload == "full" else "object_store"
    if transport == "object_store":
        return payload, transport
    if payload != "full":
        raise ConfigError(
            f"weight_sync.payload = '{payload}' needs weight_sync.transport = 'object_store', found '{transport}'"
        )
    if not on_gpu:
        raise PlacementError(
            f"weight_sync.transport = '{transport}' needs GPUs, and the cluster has none; leave it 'auto'"
        )
    if transport == "nccl" and shared:
        raise PlacementError("weight_sync.transport = 'nccl' needs a GPU per worker; with ray.share_gpu use 'ipc'")
    if transport == "ipc" and not shared:
        raise PlacementError("weight_sync.transport = 'ipc' needs ray.share_gpu; workers on their own GPUs use 'nccl'")
    return payload, transport
