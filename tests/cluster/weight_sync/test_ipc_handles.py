"""How the address of a buffer on a card travels between processes that may not unpickle."""

import inspect
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cluster.weight_sync.ipc_handles import HANDLE_FIELDS, rebuild_arguments

PLAIN: dict[str, Any] = {
    "size": [4096],
    "stride": [1],
    "offset": 0,
    "device": 0,
    "memory_handle": bytes(range(64)),
    "storage_bytes": 4096,
    "storage_offset_bytes": 512,
    "counter_handle": b"/torch_1_2",
    "counter_offset": 3,
}


def test_a_handle_in_plain_values_becomes_what_torch_wants() -> None:
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    plain = {name: [position] if name in ("size", "stride") else position for name, position in HANDLE_FIELDS.items()}
    arguments = rebuild_arguments(plain)
    assert len(arguments) == len(names) == 15
    for name, position in HANDLE_FIELDS.items():
        expected = (position,) if name in ("size", "stride") else position
        assert arguments[position] == expected
    torchs = {
        "size": "tensor_size",
        "stride": "tensor_stride",
        "offset": "tensor_offset",
        "device": "storage_device",
        "memory_handle": "storage_handle",
        "storage_bytes": "storage_size_bytes",
        "counter_handle": "ref_counter_handle",
        "counter_offset": "ref_counter_offset",
    }
    assert {names[position] for position in HANDLE_FIELDS.values()} == {
        torchs.get(name, name) for name in HANDLE_FIELDS
    }


def test_who_opens_a_buffer_opens_no_event_which_torch_would_never_close() -> None:
    arguments = dict(zip(inspect.signature(rebuild_cuda_tensor).parameters, rebuild_arguments(PLAIN), strict=True))
    assert (arguments["event_handle"], arguments["event_sync_required"]) == (b"", False)


def test_a_plain_handle_passes_between_vllms_processes_unharmed() -> None:
    message = {"ipc_handles": {"GPU-0": PLAIN}, "tensor_sizes": [4096]}
    assert MsgpackDecoder().decode(MsgpackEncoder().encode(message)) == message


def test_vllms_own_handle_does_not_without_leave_to_unpickle() -> None:
    with pytest.raises(TypeError, match="not serializable"):
        MsgpackEncoder().encode({"ipc_handles": {"GPU-0": rebuild_arguments(PLAIN)}})
    assert rebuild_arguments(PLAIN)[4] is torch.storage.TypedStorage  # one of the classes in it
