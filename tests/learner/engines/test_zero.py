"""How the ZeRO engine starts, in processes of their own; what it computes is held against plain torch in test_group."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.interpreter import python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("preloaded")]

STARTS_SHARDED = """
import sys, torch
from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from learner.model.student import load_student
from learner.engines.zero import ZeroEngine

config = LearnerConfig(zero_stage=3, dtype="float32")
student = load_student(StudentConfig(sys.argv[1]), config)

def refuse(*where):
    raise SystemExit("the whole student was brought to one device")

student.to = refuse
engine = ZeroEngine(student, config, 0, 1, "file://" + sys.argv[2])
assert not any(parameter.numel() for parameter in student.parameters()), "not sharded"
with engine.full_parameters(["model.norm.weight"]) as found:
    assert torch.equal(found["model.norm.weight"], torch.ones(64))
print("sharded")
"""
KEEPS_AN_AVERAGE = """
import sys, torch
from cluster.config.run_file import parse_run_config
from learner.engines.zero import ZeroEngine
from learner.model.student import load_student
from learner.self_teachers import SelfTeachers

folder, store, stage, dtype, rank = sys.argv[1:]
config = parse_run_config(
    f"student.model = '{folder}'\\nprompts.train = 'p'\\nteachers.only.from = 'student'\\n"
    f"teachers.only.refresh = {{ ema = 0.5 }}\\nlearner.zero_stage = {stage}\\nlearner.dtype = '{dtype}'\\n"
    "learner.num_workers = 2\\nrollout.engine.dtype = 'float32'"
)
student = load_student(config.student, config.learner)
engine = ZeroEngine(student, config.learner, int(rank), 2, "file://" + store)
names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]

def weights():
    with engine.full_parameters(names) as parameters:
        return [parameters[name].float().clone() for name in names]

teachers, first = SelfTeachers(engine, config), weights()
for _ in range(3):
    with torch.no_grad():
        for master in engine.masters():
            master.add_(0.25)
    with engine.holding([master.clone() for master in engine.masters()]):
        pass  # the weights that compute follow
    teachers.average()
last = weights()
with teachers.weights_of("only"):
    average = weights()
tolerance = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
for before, after, mean, again in zip(first, last, average, weights(), strict=True):
    torch.testing.assert_close(after, before + 0.75, rtol=tolerance, atol=tolerance)
    # 0.5 of the average before and 0.5 of 0.25, 0.5 and 0.75
    torch.testing.assert_close(mean, before + 0.53125, rtol=tolerance, atol=tolerance)
    assert torch.equal(again, after), "the student is another one afterwards"
restored = SelfTeachers(engine, config)
assert restored.restore(teachers.snapshot()) == {}
with restored.weights_of("only"):
    assert all(torch.equal(*pair) for pair in zip(weights(), average, strict=True)), "another average"
print("kept")
"""
LOADS_ONCE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from cluster.config.run_file import parse_run_config
from learner.engines.zero import ZeroEngine
from learner.worker import LearnerActor

folder, store, rank = sys.argv[1:]
config = parse_run_config(
    f"student.model = '{folder}'\\nprompts.train = 'p'\\nteachers.only.model = 't'\\nlearner.num_workers = 2\\n"
    "learner.zero_stage = 3\\nlearner.dtype = 'float32'\\nrollout.engine.dtype = 'float32'"
)

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024

class Measured(LearnerActor):
    def use(self, engine, teacher_heads):
        self.engine = engine

def load(*arguments):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = memory("VmRSS")
    student = load_student(*arguments)
    sys.stdout.write(f"{memory('VmHWM') - before}\\n")
    return student

import learner.worker
load_student, learner.worker.load_student = learner.worker.load_student, load
actor = Measured(config, int(rank), 2)
actor.start("file://" + store)
with actor.engine.full_parameters(["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]) as found:
    for name, expected in load_file(folder + "/model.safetensors").items():
        assert name not in found or torch.equal(found[name], expected), name
decoder = actor.engine.student.causal_lm.model
fresh = Qwen3RotaryEmbedding(decoder.config)
assert all(torch.equal(buffer, decoder.rotary_emb.get_buffer(name)) for name, buffer in fresh.named_buffers())
"""
ADDS_UP_IN_BFLOAT16 = """
import sys, torch
from dataclasses import replace
from cluster.config.stages import LearnerConfig
from cluster.config.sections import StudentConfig
from learner.engines.torch import ReferenceEngine
from learner.engines.zero import ZeroEngine
from learner.loss.objective import Objective
from learner.model.student import load_student
from learner.train_step import accumulate
from cluster.contracts.trajectory import ragged
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.batching.plan import plan_step
from tests.learner.support import OBJECTIVES, advantages_of, make_scored

folder, store, stage, rank = sys.argv[1:]
config = LearnerConfig(zero_stage=int(stage), dtype="bfloat16", num_workers=2, max_gradient_norm=0.5)
student = StudentConfig(folder)
zero = ZeroEngine(load_student(student, config), config, int(rank), 2, "file://" + store)
plain = ReferenceEngine(load_student(student, config), config)
objective, scored = Objective(OBJECTIVES["topk"]), make_scored(OBJECTIVES["topk"])
rows = trajectories([scored], advantages_of([scored]))
plan = plan_step(ragged(scored, "token_ids").lengths.tolist(), 2, 48)
shares = [[build_micro_batch(grid, rows, seed=0) for grid in grids] for grids in plan]
tokens = sum(len(batch.tokens) for share in shares for batch in share)
assert len(shares[0]) > 1, "one micro-batch shows no sum"

def sums(engine, batches):
    accumulate(engine, batches, len(batches), objective, {}, completes_step=True)

def same(ours, theirs):
    assert abs(ours - theirs) < 2e-3 * theirs, (ours, theirs)

sums(zero, shares[int(rank)])
sums(plain, [batch for share in shares for batch in share])
same(zero.discard(tokens), plain.discard(tokens))
kept = None
for step in range(3):
    sums(zero, shares[int(rank)])
    sums(plain, [batch for share in shares for batch in share])
    same(zero.step(1e-3, tokens), plain.step(1e-3, tokens))
    if step == 0:
        kept = zero.snapshot()
names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
with zero.full_parameters(names) as ours, plain.full_parameters(names) as theirs:
    after = {name: ours[name].float().clone() for name in names}
    for name in names:
        assert (ours[name].float() - theirs[name].float()).abs().mean() < 1e-4, name
zero.restore(kept)
for name, value in zero.snapshot().items():
    assert torch.equal(value, kept[name]), name
with zero.full_parameters(names) as ours:
    assert any(not torch.equal(after[name], ours[name].float()) for name in names), "not another state"
for _ in range(2):
    sums(zero, shares[int(rank)])
    zero.step(1e-3, tokens)
with zero.full_parameters(names) as ours:
    for name in names:
        assert torch.equal(after[name], ours[name].float()), "steps after a restore differ"
print("the same")
"""
LOOKS_FOR_NO_COMPILER = """
import deepspeed
from learner.engines.zero import _skip_shared_memory_op

_skip_shared_memory_op()
assert deepspeed.accelerator.get_accelerator().device_name() == "cuda"
assert "__compatible_ops__" not in vars(deepspeed.ops)
print("not looked")
"""


def run(program: str, *arguments: str, accelerator: str = "cpu", **variables: str) -> str:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **variables}
    # DeepSpeed picks its accelerator as it is imported.
    source = f"import os; os.environ['DS_ACCELERATOR'] = '{accelerator}'\n{program}"
    command = [python(), "-c", source, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def on_two_ranks(program: str, *arguments: str) -> list[str]:
    with ThreadPoolExecutor(2) as threads:
        ranks = [
            threads.submit(run, program, *arguments, str(rank), RANK=str(rank), WORLD_SIZE="2") for rank in range(2)
        ]
        return [rank.result() for rank in ranks]


def test_stage_3_never_brings_the_whole_student_to_a_device(student_folder: Path, tmp_path: Path) -> None:
    assert run(STARTS_SHARDED, str(student_folder), str(tmp_path / "store")) == "sharded"


def test_on_a_gpu_deepspeed_tries_no_compilers() -> None:
    assert run(LOOKS_FOR_NO_COMPILER, accelerator="cuda") == "not looked"


@pytest.mark.parametrize(
    ("stage", "dtype"), [("3", "float32"), pytest.param("2", "bfloat16", marks=pytest.mark.exhaustive)]
)
def test_two_ranks_lend_their_parts_of_an_average_to_the_student(
    stage: str, dtype: str, student_folder: Path, tmp_path: Path
) -> None:
    arguments = (str(student_folder), str(tmp_path / "store"), stage, dtype)
    assert on_two_ranks(KEEPS_AN_AVERAGE, *arguments) == ["kept", "kept"]


@pytest.mark.parametrize("stage", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_two_ranks_in_bfloat16_learn_as_one_process_of_plain_torch(
    stage: str, student_folder: Path, tmp_path: Path
) -> None:
    arguments = (str(student_folder), str(tmp_path / "store"), stage)
    assert on_two_ranks(ADDS_UP_IN_BFLOAT16, *arguments) == ["the same", "the same"]


def test_one_rank_alone_holds_the_students_weights_before_they_are_sharded(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=20_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    weights = 4 * model.num_parameters()
    model.save_pretrained(tmp_path / "model")
    arguments = (str(tmp_path / "model"), str(tmp_path / "store"))
    first, second = map(int, on_two_ranks(LOADS_ONCE, *arguments))
    assert first > 0.7 * weights > 150e6
    assert second < 0.2 * weights
