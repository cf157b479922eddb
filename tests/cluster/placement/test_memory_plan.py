"""What a run file leaves open is chosen from the GPU's size, and what cannot fit is one sentence with a setting."""

import pytest

from cluster.config.run_config import Config
from cluster.contracts.errors import PlacementError
from cluster.models.model_size import STUDENT
from cluster.placement.gpu_sharing import share_gpu, with_gpus
from cluster.placement.memory import SLEEPING_GIB, Lengths
from cluster.placement.memory_plan import plan_memory
from cluster.placement.memory_report import MemoryPlan
from tests.builders import make_config
from tests.cluster.placement.gpu_models import size

SHARED = "ray.share_gpu=true"
LISTED = "objective=tail-topk"  # candidates, no whole distributions


def plan(student: str, teacher: str, gpu_gib: float | None, *overrides: str, tokens: int = 2048) -> MemoryPlan:
    sizes = {STUDENT: size(student), "main": size(teacher)}
    return plan_memory(make_config(LISTED, *overrides), sizes, Lengths(tokens), gpu_gib)


def fractions(config: Config) -> tuple[float | None, ...]:
    engines = (config.rollout.engine, config.teachers["main"].engine)
    return (*(engine.gpu_memory_fraction for engine in engines), config.learner.gpu_memory_fraction)


# By hand, GiB a rank: weights, masters, moments, gradients (18 bytes a parameter, of which 16 are shared out under
# stage 2 and all under 3); activations of 8,192 tokens, whole or with checkpointing; 3.0 of logits; the head's
# gradients, 6 bytes; ZeRO's bucket, 2.79, or 0.56 below 32 GiB (1.86 more under stage 3); the largest tensor, 2 bytes;
# 1.5 of context; 0.5 stay free.
@pytest.mark.parametrize(
    ("student", "gpu_gib", "overrides", "expected"),
    [
        # 10.0 + 3.0 + 0.87 + 0.56 + 0.29 + 1.5 = 16.2; 8,192 tokens take 15.6, with checkpointing 1.2
        ("0.6B", 24.0, (), (8192, True)),
        ("0.6B", 48.0, (), (8192, False)),  # 18.4 + 15.6; 16,384 would take 31.2
        ("0.6B", 80.0, (), (16384, False)),
        # On eight ranks 15.3 + 15.3 + 3.0 + 3.5 + 2.79 + 1.16 + 1.5 = 42.5; 8,192 tokens 60.0, or 4.9
        ("8B", 80.0, ("learner.num_workers=8",), (8192, True)),
        ("8B", 141.0, ("learner.num_workers=8",), (8192, False)),
        ("8B", 48.0, ("learner.num_workers=8",), (8192, True)),
        # 18 x 3.28e10 / 8 bytes: 68.7, and 16 beside them; 9.6 with checkpointing, far more without
        ("32B", 141.0, ("learner.num_workers=8", "learner.zero_stage=3"), (8192, True)),
    ],
)
def test_micro_batches_are_as_large_as_the_gpu_allows(
    student: str, gpu_gib: float, overrides: tuple[str, ...], expected: tuple[int, bool]
) -> None:
    found = plan(student, "0.6B", gpu_gib, *overrides)
    learner = found.config.learner
    assert (learner.micro_batch_tokens, learner.gradient_checkpointing) == expected, found.lines()
    assert found.workers["learner"].fits
    assert found.choices[0].startswith(f"learner: micro-batches of {expected[0]:,} tokens ")


def test_what_the_run_file_says_stays() -> None:
    both = plan("8B", "0.6B", 80.0, "learner.micro_batch_tokens=5000", "learner.gradient_checkpointing=false")
    assert (both.config.learner.micro_batch_tokens, both.config.learner.gradient_checkpointing) == (5000, False)
    assert both.choices == ()
    one = plan("0.6B", "0.6B", 48.0, "learner.gradient_checkpointing=true").config.learner
    assert (one.micro_batch_tokens, one.gradient_checkpointing) == (16384, True)
    other = plan("8B", "0.6B", 80.0, "learner.num_workers=8", "learner.micro_batch_tokens=6000").config.learner
    assert (other.micro_batch_tokens, other.gradient_checkpointing) == (6000, True)
    engine = plan("0.6B", "0.6B", 80.0, "rollout.engine.gpu_memory_fraction=0.5").config.rollout.engine
    assert engine.gpu_memory_fraction == 0.5


def test_without_a_gpu_nothing_is_chosen() -> None:
    found = plan("0.6B", "0.6B", None)
    assert found.config == make_config(LISTED)
    assert (found.choices, found.fault) == ((), None)
    assert (found.config.learner.forward_tokens, found.config.learner.recomputes) == (8192, False)


@pytest.mark.parametrize("gpu_gib", [24.0, 48.0, 80.0, 141.0])
@pytest.mark.parametrize(
    "overrides", [(), (SHARED,), (SHARED, "rollout.engine.sleep=true"), ("learner.num_workers=8",)]
)
def test_choosing_again_changes_nothing(gpu_gib: float, overrides: tuple[str, ...]) -> None:
    sizes = {STUDENT: size("0.6B"), "main": size("8B")}
    once = plan_memory(make_config(*overrides), sizes, Lengths(2048), gpu_gib).config
    assert plan_memory(once, sizes, Lengths(2048), gpu_gib).config == once


def test_a_shared_gpu_gives_each_worker_what_it_needs_and_the_caches_the_rest() -> None:
    found = plan("1.7B", "8B", 80.0, SHARED)
    assert found.fault is None
    rollout, teacher, learner = fractions(found.config)
    assert rollout is not None
    assert teacher is not None
    assert learner is not None
    assert 0.93 < rollout + teacher + learner <= 0.95  # 5 % stay free
    for pool, fraction in {"rollout": rollout, "teacher-main": teacher, "learner": learner}.items():
        worker = found.workers[pool]
        assert 0 <= fraction * 80 - worker.total < 0.2
    # The teacher's weights and head, activations, logits and its process, by hand: 15.26 + 0.81 + 1.0 + 1.0.
    assert teacher * 80 - (found.config.teachers["main"].engine.kv_cache_gib or 0) == pytest.approx(18.1, abs=0.15)
    # Not the 1 GiB of before, 7,300 tokens of an 8B model.
    assert (found.workers["teacher-main"].cache_tokens or 0) > 10_000
    assert (found.workers["rollout"].cache_tokens or 0) > 40_000
    assert share_gpu(found.config).learner == learner  # and the placement takes them as they are
    assert with_gpus(found.config, True).rollout.engine == found.config.rollout.engine


@pytest.mark.parametrize(
    ("student", "fraction", "gpu_gib", "tokens"),
    [
        # fraction x GPU - weights - activations - 256 sampled rows, 0.43 - 2.0 - an update's embedding, twice, over the
        # bytes of a token
        ("0.6B", 0.25, 24.0, 15_700),  # 6.0 - 1.11 - 0.20 - 0.43 - 2.0 - 0.58 = 1.68; 9,362 a GiB
        ("8B", 0.5, 80.0, 139_400),  # 40.0 - 15.26 - 0.81 - 0.43 - 2.0 - 2.32 = 19.18; 7,282 a GiB
        ("4B", 0.3, 48.0, 17_700),  # 14.4 - 7.49 - 0.60 - 0.43 - 2.0 - 1.45 = 2.43; 7,282
    ],
)
def test_a_cache_on_a_shared_gpu_is_what_a_set_fraction_leaves(
    student: str, fraction: float, gpu_gib: float, tokens: int
) -> None:
    found = plan(student, "0.6B", gpu_gib, SHARED, f"rollout.engine.gpu_memory_fraction={fraction}")
    assert found.workers["rollout"].cache_tokens == pytest.approx(tokens, rel=0.03)
    assert fractions(found.config)[0] == fraction


def test_a_cache_that_is_set_stays_on_a_shared_gpu() -> None:
    found = plan("0.6B", "1.7B", 80.0, SHARED, "rollout.engine.kv_cache_gib=3", "teachers.main.engine.kv_cache_gib=2")
    assert (found.workers["rollout"].cache, found.workers["teacher-main"].cache) == (3.0, 2.0)
    assert len(found.choices) == 1  # of the learner


def test_a_sleeping_generator_yields_its_memory_to_the_learner() -> None:
    awake = plan("1.7B", "4B", 48.0, SHARED, "learner.offload_optimizer=cpu")
    asleep = plan("1.7B", "4B", 48.0, SHARED, "learner.offload_optimizer=cpu", "rollout.engine.sleep=true")
    assert asleep.fault is None
    learner, rollout = asleep.workers["learner"], asleep.workers["rollout"]
    share = (asleep.config.learner.gpu_memory_fraction or 0) * 48
    assert learner.resident <= share < learner.total  # the rest is what the generator has given back
    assert learner.total - share <= rollout.weights + rollout.cache
    assert learner.total >= awake.workers["learner"].total or rollout.cache > awake.workers["rollout"].cache
    ahead = plan("1.7B", "4B", 48.0, SHARED, "rollout.engine.sleep=true", "rollout.max_staleness=1")
    assert (
        ahead.config.learner.gpu_memory_fraction == plan("1.7B", "4B", 48.0, SHARED).config.learner.gpu_memory_fraction
    )


def test_teachers_of_a_slot_share_one_part_of_a_gpu() -> None:
    slot = [f"teachers.{name}={{model='t', slot='one'}}" for name in ("main", "b")]
    sizes = {STUDENT: size("0.6B"), "main": size("4B"), "b": size("1.7B")}
    found = plan_memory(make_config(LISTED, SHARED, *slot), sizes, Lengths(2048), 48.0)
    assert found.fault is None
    large, small = (found.config.teachers[name].engine.gpu_memory_fraction or 0 for name in ("main", "b"))
    rollout, _, learner = fractions(found.config)
    assert small < large
    assert (rollout or 0) + large + (learner or 0) <= 0.95
    assert found.workers["teacher-b"].context == pytest.approx(1.0 + SLEEPING_GIB)


@pytest.mark.parametrize(
    ("student", "teacher", "gpu_gib", "overrides", "sentence"),
    [
        (
            "1.7B",
            "0.6B",
            24.0,
            (),
            r"learner: a worker needs about .* \(weights 3.2, optimizer 19.2, gradients 6.4, .*\) "
            r'of a GPU\'s 24.0 GiB; set learner.offload_optimizer = "cpu"$',
        ),
        ("8B", "0.6B", 80.0, (), r'a GPU\'s 80.0 GiB; set learner.offload_optimizer = "cpu"$'),
        (
            "8B",
            "0.6B",
            80.0,
            ("learner.num_workers=8", "learner.gradient_checkpointing=false", "learner.micro_batch_tokens=8192"),
            r"set learner.gradient_checkpointing = true$",
        ),
        (
            "8B",
            "0.6B",
            48.0,
            ("learner.num_workers=8", "learner.gradient_checkpointing=true", "learner.micro_batch_tokens=65536"),
            r"set learner.micro_batch_tokens = 2048$",
        ),
        (
            "0.6B",
            "32B",
            48.0,
            (),
            r"^teacher-main: .* leave 0.00 of a GPU\'s 48.0 GiB to the cache, which holds 0 tokens and no sequence of "
            r"2,048; set teachers.main.engine.tensor_parallel = 2$",
        ),
        ("0.6B", "70B", 80.0, (), r"set teachers.main.engine.tensor_parallel = 2$"),
        ("0.6B", "30B-A3B", 48.0, (), r"weights 56.3, .* set teachers.main.engine.tensor_parallel = 2$"),
        ("32B", "0.6B", 24.0, ("learner.num_workers=8",), r"^rollout: .* set rollout.engine.tensor_parallel = 4$"),
        (
            "0.6B",
            "0.6B",
            80.0,
            ("rollout.engine.gpu_memory_fraction=0.999",),
            r"^rollout: a worker needs about 81.0 GiB .*; lower rollout.engine.gpu_memory_fraction$",
        ),
        (
            "8B",
            "8B",
            24.0,
            (SHARED,),
            r"^one GPU of 24 GiB does not hold the run: the learner takes about .* GiB, rollout .*, teacher-main .*, "
            r"and 5% must stay free; take 3 GPUs, a larger one or smaller models$",
        ),
        (
            "0.6B",
            "1.7B",
            24.0,
            (SHARED, "learner.offload_optimizer=none"),
            r'and 5% must stay free; set learner.offload_optimizer = "cpu"$',
        ),
        (  # as a run file says that was written for another GPU
            "0.6B",
            "4B",
            80.0,
            (SHARED, "rollout.engine.gpu_memory_fraction=0.03", "rollout.engine.kv_cache_gib=2"),
            r"^rollout: a worker needs about .* of 2.4 GiB on a GPU of 80.0; leave rollout.engine.gpu_memory_fraction "
            "and kv_cache_gib out of the run file: the GPU has room, and its share is then chosen$",
        ),
        (
            "0.6B",
            "4B",
            80.0,
            (SHARED, "learner.gpu_memory_fraction=0.1"),
            r"^learner: a worker needs about .*; leave learner.gpu_memory_fraction out of the run file: the GPU",
        ),
    ],
)
def test_what_cannot_fit_is_one_sentence_with_the_setting_that_lets_it(
    student: str, teacher: str, gpu_gib: float, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(PlacementError, match=sentence):
        plan(student, teacher, gpu_gib, *overrides).refuse()


# Of the review: 8 GPUs of 80 GB hold 32B only with the optimizer in host memory, and 70B too; 8 of 141 GB hold 32B.
@pytest.mark.parametrize(
    ("student", "gpus", "gpu_gib", "offload", "fits"),
    [
        ("32B", 8, 80.0, "none", False),
        ("32B", 8, 80.0, "cpu", True),
        ("32B", 8, 141.0, "none", True),
        ("32B", 16, 80.0, "none", True),
        ("70B", 8, 80.0, "none", False),
        ("70B", 8, 141.0, "none", False),
        ("70B", 8, 141.0, "cpu", True),
        ("70B", 32, 80.0, "none", True),
        ("30B-A3B", 8, 80.0, "cpu", True),
    ],
)
def test_students_that_fit_several_gpus(student: str, gpus: int, gpu_gib: float, offload: str, fits: bool) -> None:
    settings = (f"learner.num_workers={gpus}", "learner.zero_stage=3", f"learner.offload_optimizer={offload}")
    assert plan(student, "0.6B", gpu_gib, *settings).workers["learner"].fits is fits


def test_the_table_shows_every_part_the_gpu_and_what_is_left() -> None:
    lines = plan("1.7B", "8B", 80.0).lines()
    head = "weights optimizer gradients activations head logits cache buffers context sum GPU left"
    assert lines[0].split() == ["GiB", *head.split()]
    cells = lines[2].split()
    assert cells[0] == "teacher-main"
    assert (cells[1], cells[4]) == ("14.1", "0.8")
    assert cells[-2] == "80.0"
    assert float(cells[-3]) + float(cells[-1]) == pytest.approx(80.0, abs=0.11)
    parts = [float(cell) for cell in cells[1:-3] if cell != "-"]
    assert sum(parts) == pytest.approx(float(cells[-3]), abs=0.4)  # each is rounded
    assert lines[4].startswith("rollout: the cache holds 605,273 tokens, 296 of the longest sequences (2,048)")
    assert plan("1.7B", "8B", 80.0, SHARED).lines()[4].split()[:2] == ["all", "workers"]
    assert "GPU" not in plan("1.7B", "8B", None).lines()[0]


def test_a_teacher_whose_size_is_unknown_leaves_the_rest_planned() -> None:
    config = make_config(LISTED, "teachers.own={model='t', backend='package.module:Backend'}")
    sizes = {STUDENT: size("0.6B"), "main": size("1.7B")}
    found = plan_memory(config, sizes, Lengths(2048), 80.0)
    assert found.config.teachers["own"].engine.gpu_memory_fraction is None
    assert found.config.teachers["main"].engine.gpu_memory_fraction == 0.9


def test_pools_without_workers_need_nothing() -> None:
    config = make_config(LISTED, "teachers.main.num_workers=0")
    sizes = {STUDENT: size("0.6B"), "main": size("70B")}
    assert plan_memory(config, sizes, Lengths(2048), 24.0).fault is None
