"""The LM head follows the updates of a teacher's weights, whatever the payload makes of them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.contracts.errors import WeightSyncError
from cluster.models.lm_head import LmHead
from cluster.weight_sync.manifest import TensorSpec
from cluster.weight_sync.transports import make_payload
from teacher_workers.backends.arriving_head import ArrivingHead

NORM = TensorSpec("model.norm.weight", (2,), "bfloat16")
HEAD = TensorSpec("lm_head.weight", (4, 2), "bfloat16")
BIAS = TensorSpec("lm_head.bias", (4,), "bfloat16")


def message(bucket: list[TensorSpec], values: list[torch.Tensor], payload: str = "full", encoder: Any = None) -> Any:
    memory = torch.cat([one.view(-1) for one in values]).view(torch.uint8).numpy()
    fields = {}
    if encoder is not None:
        encoded = encoder.encode(bucket, memory, has_base=encoder.has_sent)
        memory, fields, encoder.has_sent = encoded.memory, dict(encoded.fields), True
    return {
        "names": [tensor.name for tensor in bucket],
        "shapes": [list(tensor.shape) for tensor in bucket],
        "dtypes": [tensor.dtype for tensor in bucket],
        "payload": payload,
        "fields": fields,
        "buffer": pa.py_buffer(memory.tobytes()),
    }


def head(bias: bool = False) -> LmHead:
    """Return one of 3 tokens; what travels has a fourth row, which only pads it."""
    return LmHead(torch.zeros(3, 2), torch.zeros(3) if bias else None, name="lm_head.weight")


def test_the_heads_rows_come_in_its_own_dtype_and_other_tensors_change_nothing() -> None:
    arriving, new = ArrivingHead(), torch.arange(8).view(4, 2).to(torch.bfloat16)
    arriving.read(head(), message([NORM], [torch.ones(2, dtype=torch.bfloat16)]))
    arriving.read(head(), message([NORM, HEAD], [torch.ones(2, dtype=torch.bfloat16), new]))
    installed = arriving.install(head())
    assert torch.equal(installed.weight, new[:3].float())
    with pytest.raises(WeightSyncError, match=r"the update lacks the teacher's LM head, 'lm_head\.weight'"):
        arriving.install(head())  # of the next update


def test_a_head_with_a_bias_takes_both() -> None:
    arriving, bias = ArrivingHead(), torch.tensor([1, 2, 3, 4], dtype=torch.bfloat16)
    arriving.read(head(bias=True), message([HEAD], [torch.ones(4, 2, dtype=torch.bfloat16)]))
    arriving.read(head(bias=True), message([BIAS], [bias]))
    installed = arriving.install(head(bias=True))
    assert installed.bias is not None
    assert (installed.weight.sum().item(), installed.bias.tolist()) == (6.0, [1.0, 2.0, 3.0])


def test_changes_alone_make_the_same_head() -> None:
    arriving, encoder = ArrivingHead(), make_payload("delta")
    encoder.has_sent = False  # type: ignore[attr-defined]
    values = torch.arange(8, dtype=torch.float32).view(4, 2).to(torch.bfloat16)
    for step in range(3):
        values[step % 3, 0] = -step - 1.0
        arriving.read(head(), message([NORM, HEAD], [torch.ones(2, dtype=torch.bfloat16), values], "delta", encoder))
        assert torch.equal(arriving.install(head()).weight, values[:3].float())


def test_the_tensors_of_a_checkpoint_may_have_another_prefix_than_the_files() -> None:
    tied = LmHead(torch.zeros(3, 2), name="embed_tokens.weight")
    assert tied.has("model.embed_tokens.weight")
    assert not tied.has("model.pre_embed_tokens.weight")
    assert np.allclose(tied.updated({"model.embed_tokens.weight": torch.ones(4, 2)}).weight, 1)
