"""The learner's parameters under the names and in the form of their checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.contracts.errors import ModelError
from cluster.weight_sync.manifest import plan_buckets
from learner.engines.torch import ReferenceEngine
from learner.model.checkpoint_format import CheckpointFormat
from learner.model.student import load_student
from tests.learner.support import SMALL

FP32 = LearnerConfig(dtype="float32")
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def write(model: Any, folder: Path, **settings: Any) -> Path:
    model(model.config_class(**SMALL, **settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "settings", "an_expert"),
    [
        (Qwen3MoeForCausalLM, EXPERTS, "model.layers.0.mlp.experts.3.up_proj.weight"),
        (MixtralForCausalLM, {"num_local_experts": 4}, "model.layers.0.block_sparse_moe.experts.3.w3.weight"),
    ],
)
def test_experts_travel_one_by_one_under_the_names_of_the_checkpoint(
    model: Any, settings: dict[str, Any], an_expert: str, tmp_path: Path
) -> None:
    student = load_student(StudentConfig(str(write(model, tmp_path, **settings))), FP32)
    in_files = load_file(tmp_path / "model.safetensors")
    manifest = student.manifest("float32")
    assert {tensor.name: tensor.shape for tensor in manifest} == {
        name: tuple(value.shape) for name, value in in_files.items()
    }
    with ReferenceEngine(student, FP32).full_parameters([an_expert]) as found:
        assert torch.equal(found[an_expert], in_files[an_expert])


def test_what_one_parameter_becomes_travels_together(tmp_path: Path) -> None:
    student = load_student(StudentConfig(str(write(Qwen3MoeForCausalLM, tmp_path, **EXPERTS))), FP32)
    manifest = student.manifest("float32")
    for bucket in plan_buckets(manifest, bucket_bytes=1):
        assert len({tensor.parameter for tensor in bucket}) == 1
    assert max(map(len, plan_buckets(manifest, bucket_bytes=1))) == 8  # gates and ups of four experts


def test_parameters_that_become_one_tensor_are_gathered_together() -> None:
    model: Any = Qwen3ForCausalLM(Qwen3ForCausalLM.config_class(**SMALL))
    parts = [f"self_attn.{part}_proj.weight" for part in ("q", "k", "v")]
    model._weight_conversions = [WeightConverter("self_attn.qkv.weight", parts, [Chunk(dim=0)])]
    found = CheckpointFormat(model)
    packed = "model.layers.0.self_attn.qkv.weight"
    assert found.parameters_of([packed]) == [f"model.layers.0.{part}" for part in parts]
    weights = [model.get_parameter(f"model.layers.0.{part}").detach() for part in parts]
    converted = found.convert(dict(zip(found.parameters_of([packed]), weights, strict=True)))
    assert torch.equal(converted[packed], torch.cat(weights))
    assert dict((tensor.name, tensor.shape) for tensor in found.manifest("float32"))[packed] == converted[packed].shape


def test_a_conversion_that_loses_values_is_refused() -> None:
    model: Any = Qwen3ForCausalLM(Qwen3ForCausalLM.config_class(**SMALL))
    model._weight_conversions = [WeightConverter("lost", ["self_attn.q_proj.weight"], [Losing()])]
    with pytest.raises(ModelError, match="does not bring its parameters back"):
        CheckpointFormat(model)


class Losing(Chunk):
    """Forgets half of what it converts back."""

    @property
    def reverse_op(self) -> Any:
        return self

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        [values] = input_dict.values()
        return {target_patterns[0]: values[0][:1]}


def test_routers_neither_jitter_nor_record(tmp_path: Path) -> None:
    settings = {"router_jitter_noise": 0.5, "output_router_logits": True, "num_local_experts": 4}
    student = load_student(StudentConfig(str(write(MixtralForCausalLM, tmp_path, **settings))), FP32)
    assert student.training
    assert student.causal_lm.model.layers[0].mlp.jitter_noise == 0
    assert student.causal_lm.config.output_router_logits is False
