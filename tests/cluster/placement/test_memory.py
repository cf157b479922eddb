import pytest

from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.models.model_size import ModelSize
from cluster.placement.memory import RESERVE_GIB, STUDENT, WorkerMemory, estimate

GIB = 2**30
# By their published config.json; a layer's keys are 8 heads of 128.
QWEN3_1_7B = ModelSize("qwen3", 1_720_574_976, 28, 2048, 6144, 151_936, kv_width=1024)
QWEN3_8B = ModelSize("qwen3", 8_190_735_360, 36, 4096, 12288, 151_936, kv_width=1024)
SIZES = {STUDENT: QWEN3_1_7B, "main": QWEN3_8B}


def make_config(*overrides: str) -> Config:
    return parse_run_config('student.model = "s"\nteachers.main.model = "t"\nprompts.train = "p"\n', overrides)


def memory(*overrides: str, gpu_gib: float | None = 80.0, tokens: int = 2048) -> dict[str, WorkerMemory]:
    return {one.pool: one for one in estimate(make_config(*overrides), SIZES, tokens, gpu_gib)}


def test_a_teacher_of_8b_in_bf16_leaves_the_rest_of_its_fraction_to_the_cache() -> None:
    teacher = memory()["teacher-main"]
    assert teacher.weights == pytest.approx(8_190_735_360 * 2 / GIB)  # 15.3 GiB
    # Keys and values of 36 layers, 1,024 numbers each, of 2 bytes: 144 KiB a token.
    assert teacher.sequences is not None
    assert teacher.sequences == pytest.approx(teacher.state / (2 * 36 * 1024 * 2 * 2048 / GIB))
    head = 151_936 * 4096 * 2 / GIB  # beside the engine, in the tenth that it leaves
    assert 0.9 * 80 + head < teacher.total < 80
    assert teacher.fault() is None


def test_stage_2_keeps_whole_weights_and_shards_the_rest() -> None:
    alone, of_four = memory()["learner"], memory("learner.num_workers=4")["learner"]
    assert alone.weights == of_four.weights == pytest.approx(1_720_574_976 * 2 / GIB)
    # float32: gradients 4 bytes, masters 4, moments 8
    assert alone.state == pytest.approx(1_720_574_976 * 16 / GIB)
    assert of_four.state == pytest.approx(alone.state / 4)
    assert memory("learner.num_workers=4", "learner.zero_stage=3")["learner"].weights == pytest.approx(
        alone.weights / 4
    )
    assert memory("learner.offload_optimizer=cpu")["learner"].state == pytest.approx(1_720_574_976 * 4 / GIB)


def test_an_average_of_the_student_is_kept_beside_the_masters() -> None:
    text = 'student.model = "s"\nprompts.train = "p"\n' + "".join(
        f'teachers.{name}.from = "student"\nteachers.{name}.refresh = {refresh}\n'
        for name, refresh in {"a": "{ ema = 0.1 }", "b": "{ every = 2 }", "c": '"live"', "d": '"frozen"'}.items()
    )
    config = parse_run_config(text, ["learner.num_workers=4"])
    [*_, learner] = estimate(config, {STUDENT: QWEN3_1_7B}, 2048, 80.0)
    assert learner.state == pytest.approx(1_720_574_976 * (16 + 2 * 4) / 4 / GIB)


def test_checkpointing_keeps_one_vector_per_layer_and_token() -> None:
    with_all, checkpointed = memory()["learner"], memory("learner.gradient_checkpointing=true")["learner"]
    assert checkpointed.working < with_all.working / 3
    kept = 8192 * 28 * 2048 * 2 / GIB
    assert checkpointed.working > kept + RESERVE_GIB


def test_what_does_not_fit_is_one_sentence() -> None:
    assert memory(gpu_gib=24.0)["learner"].fault() == (
        f"learner: a worker needs about {memory()['learner'].total:.1f} GiB of a GPU and has 24.0"
    )
    small = memory("teachers.main.engine.gpu_memory_fraction=0.2")["teacher-main"]
    assert small.fault() == "teacher-main: 0.00 GiB of cache hold no sequence of the longest kind"


def test_on_a_shared_gpu_every_engine_has_its_fraction_and_a_set_cache() -> None:
    shared = memory("ray.share_gpu=true", "rollout.engine.gpu_memory_fraction=0.25", "rollout.engine.kv_cache_gib=4")
    assert shared["rollout"].available == 20.0
    assert shared["rollout"].state == 4.0
    assert shared["learner"].available == 32.0  # learner.gpu_memory_fraction = 0.4


def test_without_a_gpu_all_share_the_nodes_memory() -> None:
    rollout = memory("rollout.engine.kv_cache_gib=2", gpu_gib=None)["rollout"]
    assert (rollout.available, rollout.state) == (None, 2.0)


def test_a_teacher_that_reads_longer_prompts_has_room_for_fewer_of_them() -> None:
    def sequences(scoring_tokens: int) -> float | None:
        config = make_config("teachers.main.engine.tensor_parallel=1")
        memory = estimate(config, SIZES, 1024, 80.0, lambda name: scoring_tokens)
        return next(one.sequences for one in memory if one.pool == "teacher-main")

    longer, same = sequences(4096), sequences(1024)
    assert longer is not None
    assert same is not None
    assert longer == pytest.approx(same / 4, rel=0.02)
