import ray

from cluster.config.objective import ObjectiveConfig
from cluster.placement.placement import cluster_nodes, plan_placement
from cluster.run.inputs import Inputs
from cluster.run.pools import start_student_as_teacher
from cluster.run.preflight import gradient_checks, mirror
from rollout_workers.prompts import PromptOrder, PromptSet
from tests.builders import make_config

BASE = ("teachers.before.model=before", "teachers.main.base=before")


def test_a_mirrored_run_has_the_student_for_every_teacher_under_the_old_names() -> None:
    mirrored = mirror(make_config(*BASE, "rollout.engine.dtype=float32", "teachers.main.engine.dtype=bfloat16"))
    assert {name: teacher.model for name, teacher in mirrored.teachers.items()} == {
        "main": "student",
        "before": "student",
    }
    assert {teacher.engine.dtype for teacher in mirrored.teachers.values()} == {"float32"}
    assert mirrored.teachers["main"].base == "before"


def test_the_mirrored_scorer_takes_the_teachers_part_of_a_shared_gpu() -> None:
    shares = ("rollout.engine.gpu_memory_fraction=0.45", "teachers.main.engine.gpu_memory_fraction=0.1")
    engine = mirror(make_config(*shares, "rollout.engine.sleep=true")).teachers["main"].engine
    assert (engine.gpu_memory_fraction, engine.sleep) == (0.1, False)


def checked_terms(objective: ObjectiveConfig) -> list[str]:
    return [name for name, term in objective.terms.items() if term.is_zero_at_the_student]


def test_only_terms_that_vanish_at_the_student_are_checked_there() -> None:
    extrapolated = make_config("objective=exopd").objective  # 1.25 - 0.25 = 1 share of the student itself
    assert checked_terms(extrapolated) == ["main"]
    delta = make_config("objective=delta-opd", *BASE).objective  # teacher - base = 0, and no student to compare with
    assert checked_terms(delta) == ["main"]
    tempered = make_config("objective.preset=exopd", "objective.terms.main.target={teacher = 0.5}").objective
    assert checked_terms(tempered) == []
    rewarded = make_config("objective=opd-grpo").objective
    assert checked_terms(rewarded) == ["main"]


def test_a_term_whose_weight_begins_at_0_is_checked_at_its_largest() -> None:
    weight = "objective.terms.main.weight={from = 0.0, to = -2.0, over_steps = 10}"
    weights = []

    def measure(objective: ObjectiveConfig) -> dict[str, float]:
        weights.extend(term.weight for term in objective.terms.values())
        return {"gradient_norm": 0.0, "sampler_learner_gap": 0.0}

    gradient_checks(make_config("objective.preset=tail-topk", weight).objective, measure, 1.0, "float32")
    assert weights == [-2.0, -2.0]


def test_the_student_takes_a_teachers_place_while_ray_still_holds_that_teachers_name(ray_cluster: None) -> None:
    class Held:
        def is_there(self) -> bool:
            return True

    config = mirror(make_config())
    share = plan_placement(config, cluster_nodes()).teachers["main"]
    teacher = ray.remote(Held).options(name=f"{share.name}-0", num_cpus=0).remote()
    assert ray.get(teacher.is_there.remote())
    prompts = PromptSet.of_token_ids([[1]], "main")
    inputs = Inputs(prompts, PromptOrder(1, seed=0, shuffle=False), (), max_model_len=8)
    start_student_as_teacher(config, inputs, share, "main")
    ray.kill(ray.get_actor("student-as-teacher-0"))
    ray.kill(teacher)
