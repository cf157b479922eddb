import msgspec
import pytest

from cluster.config.context import PrivilegedConfig
from cluster.config.fields import WeightSchedule
from cluster.config.objective import ObjectiveConfig, TokenWeightsConfig
from cluster.config.presets import PRESETS
from cluster.config.run_file import config_from_json, dump_run_config, parse_run_config
from cluster.config.terms import (
    CrossEntropyTerm,
    DivergenceTerm,
    GateConfig,
    ImportanceConfig,
    PolicyGradientTerm,
    TaskRewardTerm,
)
from cluster.contracts.errors import ConfigError
from cluster.contracts.requests import ScoreRequest
from tests.builders import MINIMAL_RUN, make_config

BASE = "\n[teachers.before]\nmodel = 'before'"


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        (ObjectiveConfig, "preset support support_size terms token_weights"),
        (
            TokenWeightsConfig,
            "first_tokens first_fraction skip_first stop_window stop_below special_tokens stop_tokens teacher_shares "
            "turns first_turns "
            "position_importance entropy",
        ),
        (ImportanceConfig, "kind low high dual_clip"),
        (
            DivergenceTerm,
            "weight when threshold rows target divergence truncation residual entry_clip beta skew parameter",
        ),
        (TaskRewardTerm, "weight when threshold rows divide_by_deviation importance"),
        (CrossEntropyTerm, "weight when threshold rows gate"),
        (GateConfig, "kappa gamma"),
        (
            PrivilegedConfig,
            "template sampler prompts_per_step samples_per_prompt hard_after max_rows min_reward select min_gentleness "
            "sharpness strength shuffled phase_steps rest_steps",
        ),
        (WeightSchedule, "to over_steps start"),
        (
            PolicyGradientTerm,
            "weight when threshold rows target over normalize_weights log_ratio_map bound scale alpha student baseline "
            "discount importance",
        ),
    ],
)
def test_the_knobs_of_the_objective_are_these_and_no_others(section: type, fields: str) -> None:
    assert " ".join(section.__struct_fields__) == fields


def test_a_weight_may_move_over_the_first_steps_and_survives_the_run_directory() -> None:
    crossfade = "objective.terms.main.weight={from = 0.0, to = 2.0, over_steps = 4}"
    config = make_config("objective.preset=opd-grpo", crossfade, "objective.terms.reward.weight=3")
    assert config_from_json(dump_run_config(config)) == config
    assert config.objective.scheduled_weights(3) == {"main": 1.5}
    weights = [[term.weight for term in config.objective.at(step).terms.values()] for step in (0, 1, 4, 1000)]
    assert weights == [[0.0, 3.0], [0.5, 3.0], [2.0, 3.0], [2.0, 3.0]]
    assert config.objective.needs == make_config("objective=opd-grpo").objective.needs
    with pytest.raises(ConfigError, match=r"terms.main.weight: Object missing required field `to`"):
        make_config("objective.preset=opd-grpo", "objective.terms.main.weight={from = 0.0, over_steps = 4}")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_run_and_survives_the_run_directory(name: str) -> None:
    config = parse_run_config(MINIMAL_RUN + BASE, [f"objective={name}", "teachers.main.base=before"])
    assert config.objective.preset == name
    assert config_from_json(dump_run_config(config)) == config


def test_what_is_written_beside_a_preset_wins_and_the_rest_stays() -> None:
    config = make_config("objective.preset=eopd", "objective.terms.unsure_teacher.threshold=1.5")
    assert config.objective.terms["unsure_teacher"] == DivergenceTerm(
        when="teacher_entropy_above", threshold=1.5, divergence="forward_kl", truncation="generalized"
    )
    assert isinstance(config.objective.terms["main"], PolicyGradientTerm)


def test_a_reverse_kl_with_a_tail_is_corrected_unless_the_run_file_says_otherwise() -> None:
    def has_residual(*overrides: str) -> bool:
        term = make_config(*overrides).objective.terms["main"]
        assert isinstance(term, DivergenceTerm)
        return term.has_residual

    assert has_residual()
    assert has_residual("objective=tail-topk")
    assert not has_residual("objective.terms.main.residual=false", "objective.preset=tail-topk")
    assert not has_residual("objective.terms.main.divergence=forward_kl", "objective.preset=tail-topk")
    assert not has_residual("objective=generalized-topk")
    assert not has_residual("objective=sdpo")
    assert has_residual("objective.preset=sdpo", "objective.terms.main.residual=true")
    assert not has_residual("objective.preset=tail-topk", "objective.terms.main.entry_clip=0.1")


def test_a_target_replaces_the_preset_s_whole() -> None:
    config = make_config("objective.preset=exopd", "objective.terms.main.target={teacher = 1.0}")
    assert config.objective.needs.models == ("teacher",)


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ("preset = 'gdk'", "no preset is called 'gdk'; there are thinking-machines"),
        ("support = 'sampled'", "terms.main: a divergence needs .* 'sampled' has draws"),
        ("terms.main = {loss = 'divergence', truncation = 'raw'}", "truncation: Invalid enum value 'raw'"),
        ("terms.main = {loss = 'divergence', trunkation = 'tail'}", "unknown field `trunkation`"),
        ("terms.main = {loss = 'k1'}", "Invalid value 'k1'"),
        ("terms.main = {loss = 'policy_gradient', over = 'support'}", "found objective.support = 'topk'"),
        ("preset = 'thinking-machines'\nterms.main.baseline = 'kl'", "baseline = 'kl' needs support"),
        ("preset = 'async-opd'\nterms.main.normalize_weights = true", "use over = 'support' and student_topk"),
        ("preset = 'async-opd'\nsupport_size = 1", "needs support_size = 2 or more"),
        ("terms.main = {loss = 'divergence', target = {teacher = 0.0}}", "no model with a coefficient other than 0"),
        ("terms.main = {loss = 'divergence', target = {maths = 1.0}}", r"the model 'maths'; expected .* \['main'\]"),
        (
            "preset = 'opd-grpo'\nterms.other = {loss = 'task_reward', divide_by_deviation = false}",
            "all task_reward terms must have the same divide_by_deviation",
        ),
        (
            "preset = 'tail-topk'\nterms.main = {divergence = 'forward_kl', residual = true}",
            "terms.main: residual weighs .* target / student, which has no bound",
        ),
        ("terms.main = {loss = 'divergence', divergence = 'jsd', beta = 0.0, residual = true}", "has no bound"),
        (
            "terms.main = {loss = 'divergence', truncation = 'generalized', residual = true}",
            "residual corrects .*'tail', found truncation = 'generalized'",
        ),
        (
            "terms.main = {loss = 'divergence', residual = true, entry_clip = 0.1}",
            "entry_clip bounds each; leave one out",
        ),
        (
            "token_weights = {first_tokens = 4, skip_first = 4}",
            "skip_first = 4 leaves nothing of first_tokens = 4",
        ),
        (
            "preset = 'exact-reverse-kl'\nterms.main.when = 'outside_support'",
            "terms.main: when = 'outside_support' needs support topk, student_topk or intersection, found 'full'",
        ),
        ("preset = 'delta-opd'", "teachers.main: .* has the model 'base', so set its base"),
        ("preset = 'gkd'\nterms.main.when = 'models_agree'", "terms.main: .* compares the models .*, which has one"),
        (
            "preset = 'thinking-machines'\nterms.main.baseline = 'support_mean'",
            "baseline = 'support_mean' needs support topk, student_topk, intersection or full, found 'sampled'",
        ),
        (
            "preset = 'vopd'\nterms.main = {baseline = 'support_mean', when = 'reward_positive'}",
            "only where all tokens of a prefix count, but when = 'reward_positive' depends",
        ),
        (
            "preset = 'thinking-machines'\nterms.main = {baseline = 'batch_mean', discount = 0.5}",
            "baseline = 'batch_mean' is the mean over all tokens, of log-ratios alone; leave out .* and discount",
        ),
        (
            "preset = 'thinking-machines'\nterms.main = {baseline = 'response_mean', discount = 0.5}",
            "baseline = 'response_mean' is the mean over all tokens, of log-ratios alone; leave out .* and discount",
        ),
        (
            "preset = 'thinking-machines'\nterms.main = {baseline = 'batch_mean', when = 'teacher_entropy_above'}",
            "leave out when = 'teacher_entropy_above' and discount",
        ),
        (
            "token_weights.teacher_shares = {maths = 1.0}",
            r"teacher_shares names \['maths'\]; expected all teachers that prompts go to, \['main'\]",
        ),
        (
            "preset = 'vopd'\nterms.main = {baseline = 'support_mean', log_ratio_map = 'constant'}",
            "would leave nothing of log_ratio_map = 'constant'",
        ),
        (
            "preset = 'vopd'\nterms.main = {baseline = 'support_mean', student = 'rollout'}",
            "student = 'rollout' divides by another",
        ),
    ],
)
def test_an_objective_that_means_nothing_is_one_sentence(objective: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse_run_config(f"{MINIMAL_RUN}[objective]\n{objective}")
    assert "\n" not in str(caught.value)


def test_candidates_of_the_student_need_its_whole_distribution() -> None:
    with pytest.raises(ConfigError, match=r"set rollout.top_p = 1 and rollout.top_k = 0, found 0.9 and 0"):
        make_config("objective=async-opd", "rollout.top_p=0.9")


@pytest.mark.parametrize("cut", ["rollout.top_p=0.9", "rollout.top_k=50"])
def test_what_is_learned_from_sampled_tokens_needs_all_of_them_to_be_possible(cut: str) -> None:
    """p = (.6, .3, .1) loses a tenth of its tokens at top_p = 0.9, and with them 12 to 34 % of the gradient."""
    with pytest.raises(ConfigError, match=r"terms.main: a policy_gradient learns .* set rollout.top_p = 1"):
        make_config("objective=thinking-machines", cut)
    reward = "objective.terms={main={loss='divergence', residual=false}, reward={loss='task_reward'}}"
    with pytest.raises(ConfigError, match=r"terms.reward: a task_reward learns"):
        make_config(reward, cut)
    with pytest.raises(ConfigError, match=r"terms.main: the residual of a divergence learns .*, or residual = false"):
        make_config(cut)
    assert make_config("objective.terms.main.residual=false", "objective.preset=tail-topk", cut)
    assert make_config("objective=exact-reverse-kl", cut).objective.needs.hidden


def test_rows_of_another_sampler_need_a_ratio_or_no_sampled_advantage() -> None:
    for valid in (
        "objective=tail-topk",
        "objective=mopd",
        "objective=gkd",
        "objective.terms={x={loss='cross_entropy'}}",
    ):
        make_config(valid).objective.check_other_samplers()
    no_ratio = "objective.terms.main.importance.kind=none"
    for refused in (("objective=thinking-machines-frozen",), ("objective.preset=thinking-machines", no_ratio)):
        with pytest.raises(ValueError, match=r"terms.main: a policy_gradient learns .* take importance.kind"):
            make_config(*refused).objective.check_other_samplers()
    with pytest.raises(ValueError, match=r"terms.reward: a task_reward learns"):
        make_config(
            "objective.preset=opd-grpo", "objective.terms.reward.importance.kind=none"
        ).objective.check_other_samplers()


PRIVILEGED = "rollout.privileged.template={{ prompt }} {{ hint }}"
IMITATED = "objective.terms.imitated={loss='cross_entropy',gate={},rows='privileged'}"


def test_a_privileged_samplers_rows_need_terms_that_can_learn_from_them() -> None:
    for valid in (
        ("objective.preset=tail-topk", "objective.terms.main.rows=student", IMITATED),
        ("objective.preset=tail-topk", IMITATED),  # a divergence is one of given prefixes, its residual has a ratio
        ("objective.preset=thinking-machines-frozen", "objective.terms.main.rows=student", IMITATED),
    ):
        assert make_config(PRIVILEGED, *valid).rollout.privileged
    for refused, message in (
        (("objective.preset=thinking-machines-frozen", IMITATED), r"terms.main: a policy_gradient .* rows = 'student'"),
        (("objective.preset=tail-topk", "objective.terms.main.rows=student"), r"none learns from the rows of rollout"),
        (("objective.terms={x={loss='cross_entropy'}}",), r"terms.x: a cross_entropy on what the student itself"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(PRIVILEGED, *refused)
    with pytest.raises(ConfigError, match=r"rollout.privileged writes for prompts .* remove one of the two"):
        make_config(PRIVILEGED, IMITATED, "rollout.replay=runs/x")
    with pytest.raises(
        ConfigError, match=r"terms.imitated: rows = 'privileged', but there is no \[rollout.privileged\]"
    ):
        make_config("objective.preset=tail-topk", IMITATED)


@pytest.mark.parametrize("when", ["advantage_positive", "outcome_disagrees"])
def test_what_compares_the_samples_of_a_prompt_needs_several(when: str) -> None:
    condition = ("objective.preset=thinking-machines", f"objective.terms.main.when={when}")
    assert make_config(*condition, "rollout.samples_per_prompt=2").objective.needs.divides_by_deviation
    assert make_config("objective=thinking-machines").objective.needs.divides_by_deviation is None
    with pytest.raises(ConfigError, match=rf"terms.main: when = '{when}' compares the samples .* is 1; set it to 2"):
        make_config(*condition, "rollout.samples_per_prompt=1")


def test_what_depends_on_the_whole_step_says_so() -> None:
    shares = make_config("objective.preset=tail-topk", "objective.token_weights.teacher_shares=equal").objective.needs
    mean = make_config("objective.preset=thinking-machines", "objective.terms.main.baseline=batch_mean").objective.needs
    assert (shares.whole_step, shares.step_means, shares.first_pass) == (True, False, False)
    assert (mean.whole_step, mean.step_means, mean.first_pass) == (True, True, False)
    assert not make_config().objective.needs.whole_step


def test_a_constant_advantage_is_not_checked_where_student_and_teacher_agree() -> None:
    control = make_config("objective.preset=thinking-machines", "objective.terms.main.log_ratio_map=constant")
    assert not control.objective.terms["main"].is_zero_at_the_student


def test_imitated_rows_may_have_been_sampled_in_any_way() -> None:
    assert make_config("objective.terms={main={loss='cross_entropy', gate={gamma=-2}}}", "rollout.top_p=0.9")


def test_later_advantages_of_an_older_student_need_temperature_1() -> None:
    frozen = ("objective.preset=minillm", "objective.terms.main.student=rollout")
    with pytest.raises(ConfigError, match=r"set rollout.temperature = 1, found 0.7, or student = 'current'"):
        make_config(*frozen, "rollout.temperature=0.7")
    assert make_config(*frozen).rollout.temperature == 1
    assert make_config("objective=minillm", "rollout.temperature=0.7").rollout.temperature == 0.7


def test_the_teacher_chooses_candidates_and_the_models_after_it_score_them() -> None:
    config = make_config("objective.terms.main={loss = 'divergence', target = {teacher = 2.0, initial_student = -1.0}}")
    assert config.scorers("main") == [
        ("main", ScoreRequest("teacher", top_k=16)),
        ("initial_student", ScoreRequest("initial_student", given_candidates=True)),
    ]


def test_candidates_of_the_student_are_given_to_every_scorer() -> None:
    config = make_config("objective=async-opd")
    assert config.scorers("main") == [("main", ScoreRequest("teacher", given_candidates=True))]
    assert config.objective.needs.num_candidates == 15  # the written token is the sixteenth draw


def test_exact_objectives_ask_for_hidden_states_and_routing_by_entropy_for_the_entropy() -> None:
    assert make_config("objective=gkd").scorers("main") == [("main", ScoreRequest("teacher", hidden=True))]
    assert make_config("objective=eopd").scorers("main") == [("main", ScoreRequest("teacher", top_k=16, entropy=True))]


def test_the_initial_student_is_served_like_the_rollout_workers_unless_described() -> None:
    config = make_config("objective=exopd", "rollout.engine.dtype=float32")
    implied = config.teachers["initial_student"]
    assert (implied.model, implied.engine.dtype) == ("student", "float32")
    described = make_config("objective=exopd", "teachers.initial_student.model=older")
    assert described.teachers["initial_student"].model == "older"


def test_prompts_are_routed_to_teachers_not_to_models_that_stand_beside_them() -> None:
    toml = MINIMAL_RUN + BASE
    config = parse_run_config(toml, ["objective=delta-opd", "teachers.main.base=before"])
    assert config.routes == ["main"]
    assert config.scorers("main")[1] == ("before", ScoreRequest("base"))
    assert parse_run_config(toml).routes == ["main", "before"]


def test_a_base_that_is_no_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teachers.main.base is 'gone'; there are \['main'\]"):
        make_config("teachers.main.base=gone")


def test_no_teacher_is_called_base() -> None:
    with pytest.raises(ConfigError, match=r"teachers.base: the name 'base' means another teacher's base"):
        make_config("teachers.base.model=b")


def test_presets_are_not_changed_by_what_is_laid_over_them() -> None:
    before = msgspec.json.encode(PRESETS)
    make_config("objective.preset=gkd", "objective.terms.main.beta=0.1")
    assert msgspec.json.encode(PRESETS) == before


def test_last_opd_fades_from_hidden_states_to_the_divergence_in_ten_steps() -> None:
    objective = make_config("objective=last-opd").objective
    assert [objective.scheduled_weights(step) for step in (0, 5, 10, 50)] == [
        {"main": 0.0, "states": 1.0},
        {"main": 0.5, "states": 0.5},
        {"main": 1.0, "states": 0.0},
        {"main": 1.0, "states": 0.0},
    ]
    assert (objective.needs.last_states, objective.needs.layer_states) == (("teacher",), ())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.privileged.sampler=math"], r"sampler = 'math' is none of the teachers; there are \['main'\]"),
        (["rollout.privileged={max_rows=2}"], r"template is missing"),
        (["teachers.main={from='student'}", "rollout.privileged.sampler=main"], r"'main' is the student itself"),
        (["rollout.privileged.sampler=main", "teachers.main.num_workers=0"], r"'main' has num_workers = 0"),
        (
            ["rollout.privileged.sampler=main", "teachers.main.url=http://host:1/v1", "rollout.temperature=0.7"],
            r"'main' writes at servers, whose log-probabilities are those of temperature 1",
        ),
        (["rollout.privileged.sampler=main", "balance=auto"], r"'main' writes, and the balancer counts scores alone"),
        (["rollout.privileged.sampler=main", "teachers.main.tokenizer=aligned"], r"'main' has another tokenizer"),
        (
            ["rollout.privileged.sampler=main", "objective.support=samples", "objective.support_size=4"],
            r"'main' writes, and objective.support = 'samples' has draws of the student alone",
        ),
    ],
)
def test_what_cannot_write_for_the_student_is_refused(overrides: list[str], message: str) -> None:
    terms = "objective={support='sampled',terms={main={loss='policy_gradient',importance={kind='truncated'}}}}"
    with pytest.raises(ConfigError, match=message):
        make_config(terms, *([] if "template" in message else [PRIVILEGED]), *overrides)


def test_a_teacher_that_writes_stands_beside_those_that_prompts_go_to() -> None:
    main = "objective.terms.main={loss='divergence',rows='student'}"
    beside = [PRIVILEGED, IMITATED, main, "rollout.privileged.sampler=writer"]
    config = make_config(*beside, "teachers.writer={model='w',backend='vllm-generate'}")
    assert (config.routes, config.sampling_teacher) == (["main"], "writer")
    alone = make_config(*beside[:-1], "rollout.privileged.sampler=main", "teachers.main.backend=vllm-generate")
    assert alone.routes == ["main"]  # it writes and scores


GENTLE = ("teachers.main={from='student',gentleness={}}", "environment.verifier=exact")
REWARDED = "objective={support='topk',support_size=1,terms={reward={loss='task_reward'}}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective={support='sampled',terms={reward={loss='task_reward'}}}"], r"set objective.support = 'topk'"),
        (["objective.preset=tail-topk"], r"no term learns from them; add loss = 'task_reward'"),
        ([REWARDED, PRIVILEGED], r"gentleness trains a sampler in a run of its own"),
        (
            [
                REWARDED.replace("'task_reward'}", "'task_reward'},m={loss='divergence',target={side=1.0}}"),
                "teachers.side={model='s',gentleness={}}",
            ],
            r"teachers.side.gentleness is of a teacher that prompts go to",
        ),
    ],
)
def test_gentleness_needs_rewards_that_are_compared_and_a_teachers_favourites(
    overrides: list[str], message: str
) -> None:
    assert make_config(*GENTLE, REWARDED, "rollout.samples_per_prompt=4").teachers["main"].gentleness
    with pytest.raises(ConfigError, match=message):
        make_config(*GENTLE, "rollout.samples_per_prompt=4", *overrides)


def test_the_defaults_term_can_be_changed_without_naming_its_kind_and_others_take_its_place() -> None:
    changed = make_config("objective.terms.main.residual=false").objective
    assert changed.terms == {"main": DivergenceTerm(residual=False)}
    assert make_config("objective.terms.main.divergence=jsd").objective.support == "topk"
    other = make_config("objective.terms.mine={loss='cross_entropy', when='log_ratio_positive'}").objective
    assert list(other.terms) == ["mine"]
