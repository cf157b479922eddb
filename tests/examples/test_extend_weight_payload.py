"""A payload of a user's own reaches real vLLM engines, in half the bytes."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.run_file import parse_run_config
from cluster.contracts.requests import SamplingSettings
from cluster.weight_sync.manifest import TensorSpec
from cluster.weight_sync.transports import choose, make_payload
from examples.extend.weight_payload import HalvesPayload, to_bfloat16
from learner.weight_sync.object_store import ObjectStoreSender
from tests.rollout_workers.deployment import FrozenEngine, RolloutDeployment
from tests.tiny_qwen3 import expected_logprobs, load

PATH = "examples.extend.weight_payload:HalvesPayload"
RUN = """
[student]
model = "{student}"
[prompts]
train = "unused.jsonl"
[rollout.engine]
dtype = "float32"
[teachers.only]
model = "unused"
[learner]
zero_stage = 0
dtype = "float32"
[weight_sync]
payload = "{payload}"
bucket_bytes = 50_000
"""
SAME = 1e-5  # nats between vLLM and transformers in float32
OTHER = 1e-4  # nats that rounded weights differ by at the very least


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_rounding_is_torchs(values: list[float]) -> None:
    floats = np.array(values, np.float32)
    expected = torch.from_numpy(floats).bfloat16()
    found = torch.from_numpy(to_bfloat16(floats)).view(torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_receiver_has_the_rounded_values_and_other_dtypes_as_they_were() -> None:
    bucket = [TensorSpec("a", (3,), "bfloat16"), TensorSpec("b", (2,), "float32")]
    values = np.frombuffer(struct.pack("<3H2f", 1, 2, 3, 1.0, 1.0 + 2**-7 + 2**-9), np.uint8).copy()
    encoded = HalvesPayload().encode(bucket, values, has_base=False)
    assert encoded.memory.size == 6 + 4
    arrived = np.concatenate(list(HalvesPayload().decode(bucket, encoded)))
    assert struct.unpack("<3H2f", arrived.tobytes()) == (1, 2, 3, 1.0, 1.0 + 2**-7)
    np.testing.assert_array_equal(values, arrived)  # what the checksum is of


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_run_on_the_rounded_weights_of_the_sender(rollouts: RolloutDeployment, tiny_student: Path) -> None:
    sent = {}
    original = load(tiny_student)
    for payload in ("full", PATH):
        config = parse_run_config(RUN.format(student=tiny_student, payload=payload))
        assert choose(config, on_gpu=False) == (payload, "object_store")
        sender = ObjectStoreSender(FrozenEngine(original), config.weight_sync, "float32", 60)
        rollouts.policy_version += 1
        # The engines' ranks and the sender compute the checksum of what arrived; other bytes would raise.
        sent[payload] = sender.publish(rollouts.pool.actors, rollouts.policy_version)
    assert make_payload(PATH).is_incremental is False
    assert sent[PATH].num_bytes == sent["full"].num_bytes / 2
    assert sent[PATH].checksum != sent["full"].checksum
    rounded = rollouts.student  # what others find in the engines afterwards
    with torch.no_grad():
        for parameter, whole in zip(rounded.parameters(), original.parameters(), strict=True):
            parameter.copy_(whole.bfloat16().float())
    rows = rollouts.generate(rollouts.requests([1, 2]), SamplingSettings(32, 1.0))  # one of each engine
    for row in rows:
        written = np.flatnonzero(row["loss_mask"])
        gaps = {}
        for name, model in (("rounded", rounded), ("original", original)):
            logprobs = expected_logprobs(model, row["token_ids"].tolist()).numpy()
            gaps[name] = np.abs(logprobs[written - 1, row["token_ids"][written]] - row["rollout_logprobs"]).max()
        assert gaps["rounded"] < SAME
        assert gaps["original"] > OTHER
