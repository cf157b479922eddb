"""Picks the LM head out of the buckets of a weight update: a pooling engine has none, and its actor keeps it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.contracts.errors import WeightSyncError
from cluster.models.lm_head import LmHead
from cluster.weight_sync.manifest import TensorSpec
from cluster.weight_sync.transports import Encoded, Payload, make_payload


class ArrivingHead:
    """Collects the tensors of one head, as updates bring them.

    An incremental payload keeps a copy of the buckets that hold them, in host memory.
    """

    def __init__(self) -> None:
        self._decoders: dict[str, Payload] = {}  # by the payload's name
        self._tensors: dict[str, Tensor] = {}  # of the update under way, by their names in the checkpoint

    def read(self, head: LmHead, update_info: dict[str, Any]) -> None:
        """Copy what a bucket holds of the head; `update_info` is the sender's message, with the bytes as `buffer`."""
        described = zip(update_info["names"], update_info["shapes"], update_info["dtypes"], strict=True)
        bucket = [TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in described]
        if not any(head.has(tensor.name) for tensor in bucket):
            return
        payload = update_info["payload"]
        decoder = self._decoders.setdefault(payload, make_payload(payload))
        encoded = Encoded(np.frombuffer(update_info["buffer"], np.uint8), update_info["fields"])
        for tensor, values in zip(bucket, decoder.decode(bucket, encoded), strict=True):
            if head.has(tensor.name):
                copy = torch.from_numpy(values.copy()).view(getattr(torch, tensor.dtype))
                self._tensors[tensor.name] = copy.view(tensor.shape)

    def install(self, head: LmHead) -> LmHead:
        """Return the head with what came; raise WeightSyncError if its matrix did not."""
        tensors, self._tensors = self._tensors, {}
        try:
            return head.updated(tensors)
        except KeyError as error:
            raise WeightSyncError(f"the update lacks the teacher's LM head, '{head.name}'") from error
