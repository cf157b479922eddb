"""Registers our weight-transfer engines with vLLM, and adds our calls to the rollout engines' worker class."""

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from cluster.vllm.sleep_calls import SleepCalls
from cluster.vllm.weight_sync.updates import UpdateCalls
from cluster.weight_sync.transports import TRANSPORTS, vllm_backend
from rollout_workers.candidates.vllm_processor import CandidateCalls


def register() -> None:
    """Make the receivers known to vLLM, which calls this plugin in each of its processes."""
    for name, transport in TRANSPORTS.items():
        if vllm_backend(name) not in WeightTransferEngineFactory._registry:  # vLLM may load plugins twice in a process
            module, _, receiver = transport.receiver.partition(":")
            WeightTransferEngineFactory.register_engine(vllm_backend(name), module, receiver)


class WorkerExtension(CandidateCalls, SleepCalls, UpdateCalls):
    """Adds the calls about sampled candidates, about sleep and about new weights."""
