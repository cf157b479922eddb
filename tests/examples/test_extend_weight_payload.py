"""A payload of a user's own reaches a real vLLM engine from a real learner, in half the bytes."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.actors.cluster import PoolTimeouts
from cluster.config.run_file import parse_run_config
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from cluster.weight_sync.manifest import TensorSpec
from cluster.weight_sync.transports import choose, make_payload
from examples.extend.weight_payload import HalvesPayload, to_bfloat16
from learner.group import LearnerGroup
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from tests.rollout_workers.deployment import make_prompts, rows_of
from tests.tiny_qwen3 import CONTEXT_TOKENS, expected_logprobs, load, write_tiny_qwen3

PATH = "examples.extend.weight_payload:HalvesPayload"
RUN = """
[student]
model = "{student}"
[prompts]
train = "unused.jsonl"
[rollout.engine]
dtype = "float32"
kv_cache_gib = 0.1
cpu_threads = 1
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


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def pool(ray_cluster: None, student: Path) -> Iterator[RolloutPool]:
    config = parse_run_config(RUN.format(student=student, payload=PATH))
    assert choose(config, on_gpu=False) == (PATH, "object_store")
    settings = RolloutActorSettings(
        student=config.student,
        engine=config.rollout.engine,
        max_model_len=CONTEXT_TOKENS,
        rows_per_batch=4,
        weight_transport="object_store",
    )
    pool = RolloutPool(settings, [{"num_cpus": 1}], PoolTimeouts(start_seconds=500, call_seconds=120))
    try:
        pool.wait_until_ready()
        pool.set_prompts(make_prompts())
        yield pool
    finally:
        pool.shutdown()


@pytest.mark.slow
def test_an_engine_runs_on_the_rounded_weights_of_the_learner(pool: RolloutPool, student: Path) -> None:
    sent = {}
    for version, payload in enumerate(("full", PATH), start=1):
        config = parse_run_config(RUN.format(student=student, payload=payload))
        group = LearnerGroup(config, [{"num_cpus": 1}])
        try:
            # The engine's ranks and the learner's rank compute the checksum of what arrived; other bytes would raise.
            sent[payload] = group.publish_weights(pool.actors, version)
        finally:
            group.shutdown()
    assert make_payload(PATH).is_incremental is False
    assert sent[PATH].num_bytes == sent["full"].num_bytes / 2
    assert sent[PATH].checksum != sent["full"].checksum
    original, rounded = load(student), load(student)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16().float())
    (handle,) = pool.generate([RolloutRequest(0, 1, 0, 0)], SamplingSettings(32, 1.0))
    [row] = rows_of(handle.reference)
    written = np.flatnonzero(row["loss_mask"])
    gaps = {}
    for name, model in (("rounded", rounded), ("original", original)):
        logprobs = expected_logprobs(model, row["token_ids"].tolist()).numpy()
        gaps[name] = np.abs(logprobs[written - 1, row["token_ids"][written]] - row["rollout_logprobs"]).max()
    assert gaps["rounded"] < SAME
    assert gaps["original"] > OTHER
