"""Arguments of vLLM and DeepSpeed that Preceptor has no name for pass through; its own ones do not."""

import pytest

from cluster.config.pass_through import (
    OWNED_BY_ENGINES,
    OWNED_BY_LEARNER,
    check_pass_through,
    deepspeed_entries,
    engine_arguments,
)
from cluster.config.run_file import config_from_json, dump_run_config
from cluster.contracts.errors import ConfigError
from tests.builders import make_config


def test_what_passes_through_is_kept_with_the_run() -> None:
    config = make_config(
        "rollout.engine.extra={block_size=32, kv_cache_dtype='fp8'}",
        "teachers.main.engine.extra.enable_expert_parallel=true",
        "learner.deepspeed.zero_optimization={overlap_comm=true, offload_optimizer={pin_memory=true}}",
        "learner.deepspeed.wall_clock_breakdown=true",
    )
    check_pass_through(config)
    assert config_from_json(dump_run_config(config)) == config
    assert config.rollout.engine.extra == {"block_size": 32, "kv_cache_dtype": "fp8"}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "rollout.engine.extra.max_model_len=9",
            r"^rollout\.engine\.extra\.max_model_len: Preceptor sets this entry of vLLM: it follows from the longest "
            r"prompt and rollout\.max_completion_tokens; set those; remove it here$",
        ),
        ("teachers.main.engine.extra.dtype=half", r"^teachers\.main\.engine\.extra\.dtype: .*set engine\.dtype"),
        ("rollout.engine.extra.blok_size=9", r"extra\.blok_size: .* no such entry; the nearest is 'block_size'$"),
        ("learner.deepspeed.optimizer.type=Adam", r"learner\.deepspeed\.optimizer: .*learner\.betas"),
        ("learner.deepspeed.zero_optimization.stage=1", r"zero_optimization\.stage: .*set learner\.zero_stage"),
        (
            "learner.deepspeed.zero_optimization.offload_param.device=nvme",
            r"offload_param\.device: .*learner\.offload_parameters",
        ),
        ("learner.deepspeed.wall_clock_breakdwn=true", r"DeepSpeed has .*nearest is 'wall_clock_breakdown'$"),
        ("rollout.engine.extra.additional_config={a=inf}", r"rollout\.engine\.extra: holds a value that config\.json"),
        ("rollout.engine.extra.seed=2026-11-30", r"rollout\.engine\.extra: holds a value that config\.json"),
    ],
)
def test_what_is_ours_or_unknown_is_refused_with_what_to_do(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_pass_through(make_config(override))


def test_without_deepspeed_there_is_nothing_to_pass_to() -> None:
    with pytest.raises(ConfigError, match=r"learner\.zero_stage = 0 uses no DeepSpeed"):
        make_config("learner={zero_stage=0, deepspeed={wall_clock_breakdown=true}}")


def test_the_names_that_are_ours_are_names_of_the_installed_releases() -> None:
    assert OWNED_BY_ENGINES.keys() <= engine_arguments()
    assert {name.partition(".")[0] for name in OWNED_BY_LEARNER} <= deepspeed_entries()
