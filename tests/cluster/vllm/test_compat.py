"""The adapter between vLLM's releases, as far as it can be asked without an engine."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo
from vllm.model_executor.models import registry
from vllm.outputs import CompletionOutput

from cluster.vllm.compat import (
    HAS_LOGITS_PROCESSORS_V2,
    LABELS_TOKENS,
    TokenVersions,
    early_logits_processors,
    inspect_models_in,
    late_logits_processors,
    taken_by,
)
from tests.interpreter import python

CLASSES, OTHERS = ("module:V1", "module:V2"), ("module:OtherV1", "module:OtherV2")


def output_of(num_tokens: int, labels: list[tuple[str, int, int]]) -> CompletionOutput:
    output = CompletionOutput(0, "", list(range(num_tokens)), None, None)
    if LABELS_TOKENS:
        output.weight_versions = [SimpleNamespace(version=name, start=start, end=end) for name, start, end in labels]
    return output


def test_every_token_has_the_version_of_the_weights_that_wrote_it() -> None:
    versions = TokenVersions()
    versions.add(output_of(2, []), 0)
    versions.add(output_of(3, []), 7)
    last = output_of(5, [("default", 0, 2), ("7", 2, 5)])
    versions.add(last, 7)
    assert versions.of(last).tolist() == [0, 0, 7, 7, 7]


def test_a_completion_under_one_version_has_it_everywhere() -> None:
    versions = TokenVersions()
    last = output_of(3, [("4", 0, 3)])
    versions.add(last, 4)
    assert versions.of(last).tolist() == [4, 4, 4]


@pytest.mark.parametrize("uses_v2", [False, True])
def test_the_logits_processor_is_that_of_the_model_runner(uses_v2: bool) -> None:
    config = SimpleNamespace(use_v2_model_runner=uses_v2, model_config=SimpleNamespace(logits_processors=None))
    early = early_logits_processors([CLASSES, OTHERS])
    late_logits_processors(config, [CLASSES, OTHERS])
    if HAS_LOGITS_PROCESSORS_V2:
        assert (early, config.model_config.logits_processors) == ({}, [CLASSES[uses_v2], OTHERS[uses_v2]])
    else:
        assert (early, config.model_config.logits_processors) == ({"logits_processors": [CLASSES[0], OTHERS[0]]}, None)


def test_without_draws_no_logits_processor_is_named() -> None:
    config = SimpleNamespace(use_v2_model_runner=True, model_config=SimpleNamespace(logits_processors=None))
    late_logits_processors(config, ())
    assert (early_logits_processors(()), config.model_config.logits_processors) == ({}, None)


def test_how_weights_are_packed_is_said_exactly_once() -> None:
    packing = {"packed": True, "packed_buffer_size_bytes": 8, "packed_num_buffers": 1}
    opening = taken_by(NCCLWeightTransferInitInfo, packing)
    updating = taken_by(NCCLWeightTransferUpdateInfo, packing)
    assert sorted([opening, updating], key=len) == [{}, packing]


def test_a_message_takes_its_own_fields_only() -> None:
    @dataclass
    class Message:
        names: list[str] = field(default_factory=list)

    assert taken_by(Message, {"names": ["a"], "packed": True}) == {"names": ["a"]}


def test_vllm_looks_at_a_model_in_the_interpreter_that_is_named(
    preloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "_SUBPROCESS_COMMAND", [])
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # what vLLM has found before is there
    noting = tmp_path / "python"
    noting.write_text(f'#!/bin/sh\necho "$1" >> "{tmp_path}/started"\nexec "{python()}" "$@"\n')
    noting.chmod(0o700)
    inspect_models_in(str(noting))
    model = registry.ModelRegistry.models["Qwen3ForCausalLM"]
    found = model.inspect_model_cls()
    assert (found.architecture, found.is_text_generation_model) == ("Qwen3ForCausalLM", True)
    assert (tmp_path / "started").read_text() == "-c\n"
    assert model.inspect_model_cls().architecture == found.architecture  # read from the file
    assert (tmp_path / "started").read_text() == "-c\n"
