from pathlib import Path

import msgspec
import pytest

from cluster.config.run_config import Config
from cluster.config.run_file import config_from_json, dump_run_config, load_run_config, parse_run_config
from cluster.config.stages import BalanceConfig
from cluster.contracts.errors import ConfigError
from tests.builders import MINIMAL_RUN, make_config

FIELDS = {
    "run": "name steps seed directory hooks",
    "student": "model trust_remote_code",
    "prompts": "train held_out columns answer_after template system_prompt chat_template_kwargs last_answer too_long "
    "prompts_per_step shuffle",
    "rollout": "num_workers min_workers max_workers samples_per_prompt max_completion_tokens temperature top_p top_k "
    "horizon stop stop_token_ids stop_class stop_repetition rows_per_batch max_staleness keep_cache_on_update "
    "privileged record replay engine",
    "teachers": "model source refresh backend signals trust_remote_code num_workers slot min_workers max_workers "
    "accept_differences excluded_token_ids stop_class context shuffled_context gentleness base url api_key_env "
    "tokenizer min_coverage alignment request_timeout_seconds retry_seconds states engine",
    "objective": "preset support support_size terms token_weights",
    "learner": "num_workers zero_stage dtype micro_batch_tokens gradient_checkpointing compile attention head_dtype "
    "learning_rate lr_schedule warmup_steps min_learning_rate_ratio betas epsilon weight_decay max_gradient_norm "
    "offload_optimizer offload_parameters gpu_memory_fraction cpu_threads deepspeed",
    "balance": "mode observe_steps cooldown_steps min_gain",
    "weight_sync": "payload transport bucket_bytes",
    "score_audit": "every_steps rows tolerance_nats",
    "environment": "kind verifier rewards reward_seconds harness arguments python episodes_at_once "
    "max_observation_tokens max_turns max_turn_tokens "
    "episode_seconds tools tool_format tool_seconds",
    "evaluation": "every_steps num_prompts samples_per_prompt temperature teacher_too",
    "checkpoint": "every_steps keep_last export",
    "alarms": "metric above below relative_to steps action",
    "logging": "tensorboard wandb_project trackio_project sample_table_steps kept_rows kept_every_steps kept_mib "
    "trace_steps",
    "ray": "address share_gpu dashboard dashboard_host preload start_timeout_seconds call_timeout_seconds max_restarts "
    "restart_window_seconds silence_seconds",
}


def test_the_knobs_are_these_and_no_others() -> None:
    found = {}
    for field in msgspec.structs.fields(Config):
        if field.name == "method":  # a text
            continue
        section = field.type
        if field.name == "teachers":
            section = section.__args__[0].__args__[1]
        elif field.name == "alarms":
            section = section.__args__[1]
        found[field.name] = " ".join(section.__struct_fields__)
    assert found == FIELDS


def test_the_resolved_copy_reads_back_as_the_same_run() -> None:
    config = make_config("learner.learning_rate=3e-4", "rollout.stop=['###']")
    assert config_from_json(dump_run_config(config)) == config


def test_an_override_wins_over_the_file_and_bare_words_are_texts() -> None:
    config = parse_run_config(MINIMAL_RUN + "[run]\nsteps = 5", ["run.steps=7", "run.name=trial"])
    assert (config.run.steps, config.run.name) == (7, "trial")


def test_a_url_says_all_that_a_teacher_elsewhere_needs() -> None:
    teacher = make_config("teachers.main={model='big',url='http://host:8000/v1/'}").teachers["main"]
    assert (teacher.backend, teacher.engine.tensor_parallel, teacher.urls) == ("http", 0, ("http://host:8000/v1",))
    both = "teachers.main={model='big',url=['http://a:1/v1','https://b/v1'],api_key_env='KEY'}"
    assert make_config(both).teachers["main"].urls == ("http://a:1/v1", "https://b/v1")
    config = make_config(both)
    assert config_from_json(dump_run_config(config)) == config


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("url='host:8000'", r"teachers.main: url is 'host:8000'; expected http:// or https://, a host and a path"),
        ("url='http://me:s3cret@host/v1'", r"url holds a user name or password, .*; put a key into an environment"),
        ("url=[]", "url = \\[\\] names no server"),
        ("api_key_env='KEY'", "teachers.main: api_key_env is for teachers with a url; set url, or remove it"),
        ("tokenizer='t'", "teachers.main: tokenizer is 't'; expected 'same' or 'aligned'"),
        ("backend='http'", "teachers.main: backend = 'http' needs a url"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused(fields: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as raised:
        make_config(f"teachers.main={{model='big',{fields}}}")
    assert "s3cret" not in str(raised.value)


def test_an_override_reaches_a_named_teacher() -> None:
    assert make_config("teachers.main.num_workers=3").teachers["main"].num_workers == 3


def test_a_word_turns_the_balancer_on() -> None:
    assert make_config().balance.mode == "off"
    assert make_config("balance=auto").balance == BalanceConfig(mode="auto")
    from_file = parse_run_config('balance = "auto"\n' + MINIMAL_RUN, ["balance.observe_steps=2"])
    assert from_file.balance == BalanceConfig(mode="auto", observe_steps=2)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("learner.zero_stag=2", "learner: .*unknown field `zero_stag`"),
        ("learner.dtype=float16", "learner.dtype: Invalid enum value 'float16'"),
        ("learner.zero_stage=4", "learner.zero_stage: Invalid enum value 4"),
        ("run.steps=0", "run.steps: Expected `int` >= 1"),
        ("learner={zero_stage=0,num_workers=2}", "learner.zero_stage = 0 is one rank"),
        ("learner.offload_parameters=cpu", "needs learner.zero_stage = 3, found 2"),
        ("learner={dtype='float32',head_dtype='bfloat16'}", "needs learner.dtype = 'bfloat16', found 'float32'"),
        ("teachers.main.engine.sleep=true", r"teachers.main.engine.sleep is set, but only rollout engines"),
        ("rollout.engine.quantization=fp8", "is 'fp8', but a student gets new weights"),
        ("rollout.engine.gpu_memory_fraction=1.5", "gpu_memory_fraction: Expected `float` <= 1.0"),
        ("rollout.temperature=2.5", "rollout.temperature: Expected `float` <= 2.0"),
        ("rollout.temperature=0", "rollout.temperature: Expected `float` >= 0.01"),
        ("evaluation.temperature=2.5", "evaluation.temperature: Expected `float` <= 2.0"),
        ("teachers.main.slot=a/b", "teachers.main.slot: Expected `str` matching regex"),
        (
            "teachers={main={model='a',slot='s'},code={model='b',slot='s',num_workers=2}}",
            "teachers.code: num_workers and engine.tensor_parallel are 2 and 1, but 1 and 1 of teachers.main",
        ),
        ("run.name=a/b", "run.name: Expected `str` matching regex"),
        ("rollout.max_workers=0", "rollout.max_workers: Expected `int` >= 1"),
        ("rollout.min_workers=2", "rollout: num_workers = 1 is less than min_workers = 2; raise or lower one"),
        ("teachers.main={model='m',num_workers=3,max_workers=2}", "teachers.main: num_workers = 3 is more than max_"),
        ("balance=on", "balance.mode: Invalid enum value 'on'"),
        ("balance.min_gain=1", "balance.min_gain: Expected `float` < 1.0"),
        ("steps", "expected section.field=value"),
        ("run.name.x=1", "Expected `str`, got `object`"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_its_path(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        make_config(override)
    assert "\n" not in str(caught.value)


def test_teachers_of_a_slot_are_scored_by_the_same_workers() -> None:
    config = make_config("teachers.main.slot=s", "teachers.code={model='b'}", "teachers.prose={model='c',slot='s'}")
    assert config.scorer_groups == {"slot-s": ["main", "prose"], "teacher-code": ["code"]}


def test_a_missing_run_file_and_broken_toml_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot read the run file: No such file"):
        load_run_config(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load_run_config(tmp_path / "broken.toml")


def test_a_run_without_teachers_is_refused() -> None:
    with pytest.raises(ConfigError, match="teachers"):
        parse_run_config('[student]\nmodel = "a"\n[prompts]\ntrain = "p"\n[teachers]\n')


def test_the_verifier_is_still_read_from_where_it_stood_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = parse_run_config(MINIMAL_RUN + '[evaluation]\nverifier = "math"')
    assert config.environment.verifier == "math"
    assert [record.getMessage() for record in caplog.records] == [
        "run file: evaluation.verifier is now environment.verifier; rename it"
    ]
    assert make_config("evaluation.verifier=math", "environment.verifier=regex").environment.verifier == "regex"


SELF = MINIMAL_RUN.replace('model = "teacher"', 'from = "student"')


def test_a_teacher_that_is_the_student_has_its_model_and_its_engine() -> None:
    overrides = ["rollout.engine.dtype=float32", "rollout.engine.sleep=true", "teachers.main.engine.kv_cache_gib=2"]
    config = parse_run_config(SELF, [*overrides, "student.trust_remote_code=true"])
    teacher = config.teachers["main"]
    assert (teacher.model, teacher.trust_remote_code, teacher.source, teacher.refresh) == (
        "student",
        True,
        "student",
        "frozen",
    )
    assert (teacher.engine.dtype, teacher.engine.kv_cache_gib, teacher.engine.sleep) == ("float32", 2.0, False)
    assert config_from_json(dump_run_config(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers.main.model=other"], "model is 'other', but from = 'student' makes it 'student'"),
        (["teachers.main.url=http://host/v1"], "from = 'student' is served by workers of the run"),
        (["teachers.main.from=teacher"], "Invalid enum value 'teacher'"),
        (["teachers.main.refresh=daily"], "Invalid enum value 'daily' - at|teachers.main.refresh: Invalid enum"),
        (["teachers.main.refresh={}"], "sets nothing; set one of every, ema and gate"),
        (["teachers.main.refresh={every=2, ema=0.1}"], "sets every and ema; set one of every, ema and gate"),
        (["teachers.main.refresh={every=0}"], "teachers.main.refresh.every"),
        (["teachers.main.refresh={ema=1.5}"], "teachers.main.refresh.ema"),
        (["teachers.main.refresh={gate='train/kl'}"], "teachers.main.refresh.gate"),
        (["teachers.main.refresh={every=2, better='lower'}"], "better = 'lower' is for a gate's metric"),
        (["teachers.main.refresh={gate='held_out/accuracy'}"], "set prompts.held_out and evaluation.every_steps"),
        (["teachers.main.refresh=live", "teachers.main.slot=a"], "remove slot, or leave it 'frozen'"),
        (["teachers.main.refresh=live", "teachers.main.engine.quantization=fp8"], "remove quantization, or leave it"),
        (
            ["teachers.main.refresh=live", "objective.support=full", "rollout.max_staleness=1"],
            "set rollout.max_staleness = 0",
        ),
    ],
)
def test_a_teacher_is_the_student_or_another_model(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config(SELF, overrides)


def test_refresh_is_for_teachers_that_are_the_student() -> None:
    with pytest.raises(ConfigError, match=r"teachers\.main\.refresh is for teachers that are the student"):
        make_config("teachers.main.refresh=live")


@pytest.mark.parametrize(
    ("refresh", "versions"),
    [
        ("frozen", [0, 0, 0, 0, 0]),
        ("live", [0, 1, 2, 3, 4]),
        ("{every=1}", [0, 1, 2, 3, 4]),
        ("{every=3}", [0, 0, 0, 3, 3]),
        ("{ema=0.1}", [0, 1, 2, 3, 4]),
        ("{gate='held_out/accuracy'}", [None] * 5),
    ],
)
def test_a_refresh_says_which_version_scores_each_step(refresh: str, versions: list[int | None]) -> None:
    evaluated = ["prompts.held_out=held_out.jsonl", "evaluation.every_steps=2"]
    teacher = parse_run_config(SELF, [*evaluated, f"teachers.main.refresh={refresh}"]).teachers["main"]
    assert [teacher.version_due(step) for step in range(5)] == versions
    assert teacher.is_refreshed == (refresh != "frozen")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learnr.dtype = 'float32'", "unknown field `learnr`; did you mean learner?"),
        ("learner.learning_rat = 1.0", "learner: .* unknown field `learning_rat`; did you mean learning_rate?"),
        ("run.max_staleness = 1", "run: .* unknown field `max_staleness`; did you mean rollout.max_staleness?"),
        (
            "run.num_workers = 1",
            "did you mean rollout.num_workers or teachers.NAME.num_workers or learner.num_workers?",
        ),
        ("checkpoint.lr = 1", "unknown field `lr`; there are every_steps, keep_last, export$"),
        ("learner.dtype = 'fp16'", "learner.dtype: Invalid enum value 'fp16'; expected one of bfloat16, float32$"),
        ("teachers.self = {from = 'student', refresh = 'always'}", "teachers.self.refresh: .* one of frozen, live$"),
        ("objective.terms.main.loss = 'kl'", "terms.main.loss: .* one of policy_gradient, divergence, task_reward, "),
        ("objective.terms.main = {loss = 'divergence', betaa = 1}", "unknown field `betaa`; did you mean beta?"),
        ("learner.learning_rate = '1e-5'", "learner.learning_rate: Expected `float`, .*; write a number, without quo"),
        ("rollout.stop = '###'", r'rollout.stop: Expected `array`, got `str`; write a list: \["..."\]'),
        ("run.name = 'a/b'", "run.name: .*; use letters, digits, '.', '_' and '-', a letter or digit first"),
    ],
)
def test_a_wrong_field_or_value_is_told_what_it_could_be(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_run_config(f"student.model = 'm'\nteachers.t.model = 't'\nprompts.train = 'p'\n{text}")


def test_a_tilde_is_the_home_folder_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = "student.model = '~/s'\nteachers.t.model = '~/t'\nprompts.train = '~/p.jsonl'"
    config = parse_run_config(text, ["run.directory=~/runs"])
    found = (config.student.model, config.teachers["t"].model, config.prompts.train, config.run.directory)
    assert found == ("/home/me/s", "/home/me/t", "/home/me/p.jsonl", "/home/me/runs")
