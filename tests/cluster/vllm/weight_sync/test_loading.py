"""What an update leaves out is found, by vLLM's own count of values, and experts are packed anew."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, record_metadata_for_reloading

from cluster.vllm.weight_sync.loading import (
    fault_of_incomplete,
    missing_parameters,
    return_expert_kernels,
    take_expert_kernels,
    tied_layers,
)
from cluster.vllm.weight_sync.nccl_and_ipc import NcclReceiver


def load_expert(param: nn.Parameter, loaded: torch.Tensor, expert: int) -> None:
    param.data[expert].copy_(loaded)


class Experts(nn.Module):
    """Holds one tensor of all experts, which come one at a time."""

    def __init__(self) -> None:
        super().__init__()
        weight: Any = nn.Parameter(torch.zeros(3, 4, 5))
        weight.weight_loader = load_expert
        self.experts = weight


@pytest.fixture
def model() -> nn.Sequential:
    """Return a model in the middle of an update, as vLLM prepares it."""
    model = nn.Sequential(nn.Linear(3, 4), Experts(), nn.LayerNorm(2))
    record_metadata_for_reloading(model)
    initialize_layerwise_reload(model)
    return model


def load(model: nn.Module, name: str, *which: int) -> None:
    parameter: Any = model.get_parameter(name)
    parameter.weight_loader(parameter, torch.ones(parameter.shape[len(which) :]), *which)


def load_all_but_an_expert(model: nn.Module) -> None:
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        load(model, name)
    load(model, "1.experts", 0)
    load(model, "1.experts", 2)


def test_a_full_update_has_no_fault(model: nn.Module) -> None:
    load_all_but_an_expert(model)
    load(model, "1.experts", 1)
    assert fault_of_incomplete(model, []) is None


def test_an_expert_that_did_not_come_is_a_fault(model: nn.Module) -> None:
    load_all_but_an_expert(model)
    assert fault_of_incomplete(model, []) == "the update does not fill 1 (40 of 60 values)"


def test_a_bias_that_did_not_come_is_a_fault(model: nn.Module) -> None:
    load(model, "0.weight")
    found = fault_of_incomplete(model, [])
    assert found == "the update does not fill 0 (12 of 16 values), 1 (0 of 60 values), 2 (0 of 4 values)"


def test_a_layer_that_is_filled_through_another_need_not_be(model: nn.Sequential) -> None:
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        load(model, name)
    assert fault_of_incomplete(model, [model[1]]) is None


def test_an_update_between_gpus_is_held_against_the_model_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Experts(), nn.LayerNorm(2))
    record_metadata_for_reloading(model)
    settings: Any = SimpleNamespace(parallel_config=None, model_config=None)
    config: Any = None
    receiver = NcclReceiver(config, settings, torch.device("cpu"), model)
    receiver.begin()
    receiver.start_weight_update()
    load_all_but_an_expert(model)
    receiver.finish_weight_update()
    assert receiver.end()["fault"] == "the update does not fill 1 (40 of 60 values)"
    receiver.begin()
    receiver.start_weight_update()
    load_all_but_an_expert(model)
    load(model, "1.experts", 1)
    receiver.finish_weight_update()
    assert receiver.end()["fault"] is None


def test_experts_lose_their_kernels_for_an_update_and_get_them_back_if_it_does_not_come() -> None:
    first, second, third = (SimpleNamespace(moe_kernel=f"kernel {number}") for number in range(3))
    layers = [nn.Identity() for _ in range(4)]
    for layer, method in zip(layers, (first, second, third), strict=False):
        layer.quant_method = method  # type: ignore[assignment]
    third.moe_kernel = None  # a layer that has none
    taken = take_expert_kernels(nn.Sequential(*layers))
    assert (first.moe_kernel, second.moe_kernel) == (None, None)
    second.moe_kernel = "new"  # vLLM made one with the weights that came
    return_expert_kernels(taken)
    assert (first.moe_kernel, second.moe_kernel, third.moe_kernel) == ("kernel 0", "new", None)


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def test_a_parameter_that_no_name_touched_is_missing() -> None:
    assert missing_parameters({"norm.weight", "embed.weight"}, {"embed.weight"}, {"embed.weight"}, {}) == [
        "norm.weight"
    ]


def test_what_is_no_parameter_of_the_learner_is_not_missing() -> None:
    assert missing_parameters({"gate.e_score_correction_bias"}, set(), set(), {}) == []


def test_one_absent_part_of_a_packed_parameter_is_missing() -> None:
    received = {"layers.0.q_proj.weight", "layers.0.v_proj.weight"}
    names = {"layers.0.qkv_proj.weight"}
    assert missing_parameters(names, names, received, PACKED) == ["layers.0.k_proj.weight"]


def test_a_packed_parameter_that_arrives_under_other_names_is_not_missing() -> None:
    names = {"layers.0.qkv_proj.weight"}
    assert missing_parameters(names, names, {"h.0.attn.c_attn.weight"}, PACKED) == []


def test_the_second_owner_of_a_parameter_is_tied() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False), torch.nn.Linear(2, 4))
    model[1].weight = model[0].weight
    assert tied_layers(model) == [model[1]]
