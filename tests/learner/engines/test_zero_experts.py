"""Experts under ZeRO, in two ranks: what is gathered is what plain torch trains, in the form of the checkpoint."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.interpreter import python
from tests.learner.support import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("preloaded")]

PROGRAM = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed picks it as it is imported
import torch
from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.engines.torch import ReferenceEngine
from learner.engines.zero import ZeroEngine
from learner.loss.objective import Objective
from learner.model.student import load_student
from tests.learner.support import OBJECTIVES, completion_tokens, make_scored

torch.set_num_threads(1)
folder, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
scored = make_scored(OBJECTIVES["topk"])
rows = trajectories([scored])
(grids,) = plan_step([len(row.token_ids) for row in rows], 1, 1000)
batch, objective = build_micro_batch(grids[0], rows, seed=0), Objective(OBJECTIVES["topk"])
# With AdamW's own epsilon, a gradient that is nothing but rounding would move a weight as far as any other.
settings = {"dtype": "float32", "learning_rate": 1e-2, "num_workers": 2, "epsilon": 1e-3}

def trained(engine):
    evaluation = engine.forward(batch, objective)
    engine.backward(evaluation.loss, is_last=True)
    engine.step(1e-2, completion_tokens(scored) * engine.world_size)  # every rank has the whole batch
    names = [tensor.name for tensor in engine.student.manifest("float32")]
    with engine.full_parameters(names) as found:
        return {name: value.clone() for name, value in found.items()}

config = LearnerConfig(zero_stage=2, **settings)
expected = trained(ReferenceEngine(load_student(StudentConfig(folder), config), config))
assert "model.layers.1.mlp.experts.3.down_proj.weight" in expected
for stage in (2, 3):
    config = LearnerConfig(zero_stage=stage, **settings)
    engine = ZeroEngine(load_student(StudentConfig(folder), config), config, rank, 2, "file://" + store)
    found = trained(engine)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        where = f"stage {stage}: {name}"
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=lambda said: f"{where}: {said}")
print("as in plain torch")
"""


def test_gathered_experts_are_those_of_plain_torch(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "student")
    ranks = []
    for rank in range(2):
        command = [python(), "-c", PROGRAM, str(tmp_path / "student"), str(tmp_path / "store"), str(rank)]
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        environment = {**os.environ, **variables}
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    for process in ranks:
        output, errors = process.communicate(timeout=280)
        assert output.strip().endswith("as in plain torch"), errors[-2000:]
