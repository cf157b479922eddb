"""The parts of the benchmark whose outcome does not depend on the machine."""

from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.cases.hand_off import SIGNAL_TOP_K, SIGNAL_WIDTH, bytes_per_token
from benchmarks.cases.weight_sync import SyncEngine, Synthetic, take_step
from benchmarks.harness.mapping_actor import check_buckets
from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.vllm.weight_sync.shared_memory import mappable
from cluster.weight_sync.manifest import checksum, total_bytes
from learner.model.student import load_student
from tests.tiny_qwen3 import write_tiny_qwen3


def test_signals_take_the_bytes_of_their_values_and_little_else() -> None:
    found = bytes_per_token()
    assert found["sampled"] == pytest.approx(4, rel=0.02)
    assert found[f"top-{SIGNAL_TOP_K}"] == pytest.approx(8 * SIGNAL_TOP_K, rel=0.02)
    assert found["hidden"] == pytest.approx(2 * SIGNAL_WIDTH, rel=0.02)


def test_the_checking_process_digests_buckets_in_order_and_begins_anew_after_an_update() -> None:
    ours, theirs = Pipe()
    Thread(target=check_buckets, args=(theirs,), daemon=True).start()
    for parts in ([b"first", b"second"], [b"third"]):
        for number, part in enumerate(parts):
            with mappable(pa.py_buffer(part)) as region:
                ours.send(asdict(region))
                assert ours.recv() == checksum(parts[: number + 1])
        ours.send(None)
        assert ours.recv() == checksum(parts)


def test_a_step_moves_float32_weights_by_the_learning_rate_and_few_of_them_in_bfloat16(tmp_path: Path) -> None:
    student = load_student(StudentConfig(str(write_tiny_qwen3(tmp_path))), LearnerConfig(dtype="float32"))
    weight = student.causal_lm.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = weight.detach().clone()
    take_step(student, torch.optim.AdamW(student.parameters(), 1e-5, weight_decay=0.0), seed=0)
    assert (weight - before).abs().max().item() == pytest.approx(1e-5, rel=0.1)  # AdamW's first step: its sign alone
    changed = (weight.bfloat16() != before.bfloat16()).float().mean().item()
    assert 0 < changed < 0.1


def test_the_synthetic_parameters_are_those_of_the_manifest() -> None:
    manifest = Synthetic().manifest("bfloat16")
    engine = SyncEngine(Synthetic(), {tensor.name: torch.zeros(1) for tensor in manifest})
    with engine.full_parameters([manifest[0].name]) as parameters:
        assert list(parameters) == ["layer0"]
    assert total_bytes(manifest) == np.prod([32, 4 << 20, 2])
