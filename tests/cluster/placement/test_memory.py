"""What lies on GPUs of 24, 48, 80 and 141 GB, against sums by hand; GiB are of 2^30 bytes."""

import pytest

from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.models import token_scores
from cluster.models.model_size import STUDENT, size_of
from cluster.placement.memory import LEARNED_LOGITS, SCORED_LOGITS, Lengths, WorkerMemory, estimate
from learner.model import completion_head
from tests.cluster.placement.gpu_models import CONFIGS, PARAMETERS, size

GIB = 2**30
# Bytes of one token's keys and values in bfloat16: 2 x layers x key heads x 128 x 2.
KV_BYTES = {
    "0.6B": 114_688,
    "1.7B": 114_688,
    "4B": 147_456,
    "8B": 147_456,
    "14B": 163_840,
    "32B": 262_144,
    "70B": 327_680,
    "30B-A3B": 98_304,
}
# Bytes that autograd keeps of one token in one layer, in bfloat16, by hand. d: width, q and k: all heads' queries and
# keys, i: inner width, h and g: their heads.
#   norms of layer and heads: a float32 copy, the result, one float32 number   6 (2d + q + k) + 4 (2 + h + g)
#   what q, k, v and gate, up read                                            4d
#   attention: queries, keys, values, result, a float32 sum per head          4 (q + k) + 4h
#   feed-forward: gate, its activation, up, product                           8i
# 0.6B: 6 x 5,120 + 104 + 4,096 + 12,288 + 64 + 24,576 = 71,848
# 8B: 6 x 13,312 + 168 + 16,384 + 20,480 + 128 + 98,304 = 215,336
# 70B, without norms of heads: 6 x 16,384 + 8 + 32,768 + 36,864 + 256 + 229,376 = 397,576
# 30B-A3B, i = 8 x 768, and 8 experts' copies of input and output, 4 x 8 d:
#   6 x 8,704 + 152 + 8,192 + 18,432 + 128 + 49,152 + 65,536 = 193,816
KEPT_BYTES = {"0.6B": 71_848, "8B": 215_336, "70B": 397_576, "30B-A3B": 193_816}


def make_config(*overrides: str) -> Config:
    text = 'student.model = "s"\nteachers.main.model = "t"\nprompts.train = "p"\nobjective = "tail-topk"\n'
    return parse_run_config(text, overrides)


def memory(
    *overrides: str, student: str = "1.7B", teacher: str = "8B", gpu_gib: float | None = 80.0, tokens: int = 2048
) -> dict[str, WorkerMemory]:
    sizes = {STUDENT: size(student), "main": size(teacher)}
    return estimate(make_config(*overrides), sizes, Lengths(tokens), gpu_gib)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_says_how_many_parameters_and_how_wide_the_cache_is(name: str) -> None:
    assert size(name).parameters == PARAMETERS[name]
    assert size(name).kv_values_per_token * 2 == KV_BYTES[name]


@pytest.mark.parametrize("name", KEPT_BYTES)
def test_kept_bytes_of_a_token_are_those_by_hand(name: str) -> None:
    assert size(name).saved_bytes_per_token(2) == KEPT_BYTES[name]


@pytest.mark.parametrize("gpu_gib", [24.0, 48.0, 80.0, 141.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rollout_engine_leaves_the_rest_of_its_fraction_to_the_cache(name: str, gpu_gib: float) -> None:
    rollout = memory(student=name, gpu_gib=gpu_gib)["rollout"]
    config = CONFIGS[name]
    experts = 8 * 768 if name == "30B-A3B" else config.intermediate_size
    copies = 16 * config.hidden_size if name == "30B-A3B" else 0
    # 8,192 tokens in a feed-forward layer, 1,024 sampled rows of 12 bytes a token of the vocabulary, a CUDA context and
    # a workspace of 0.5 each, CUDA graphs of 1.0.
    inside = PARAMETERS[name] * 2 / GIB + 2.0
    inside += 8192 * (3 * experts + 4 * config.hidden_size + copies) * 2 / GIB + 1024 * config.vocab_size * 12 / GIB
    # Beside it NCCL's 0.5, a buffer for the largest tensor, or 0.25, and that tensor once more, as its layer is loaded;
    # 0.5 stay free.
    largest = config.vocab_size * config.hidden_size * 2 / GIB
    outside = 0.5 + max(0.25, largest) + largest
    fraction = min(0.9, int((gpu_gib - outside - 0.5) / gpu_gib * 1000) / 1000)
    tokens = max(0.0, fraction * gpu_gib - inside) * GIB / KV_BYTES[name]
    assert rollout.cache_tokens == pytest.approx(tokens, abs=1)
    assert rollout.fits == (tokens >= 2048)
    if tokens:
        assert rollout.total == pytest.approx(fraction * gpu_gib + outside)


@pytest.mark.parametrize("gpu_gib", [24.0, 48.0, 80.0, 141.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_teachers_engine_has_room_for_its_head_and_logits(name: str, gpu_gib: float) -> None:
    teacher = memory(teacher=name, gpu_gib=gpu_gib)["teacher-main"]
    config = CONFIGS[name]
    head = config.vocab_size * config.hidden_size * 2 / GIB
    # vLLM's model has a tied head as its embedding and leaves another out: the worker's copy takes its place.
    assert teacher.head == pytest.approx(head)
    assert teacher.weights == pytest.approx(PARAMETERS[name] * 2 / GIB - (0 if config.tie_word_embeddings else head))
    assert (teacher.logits, teacher.context) == (2 * 0.5, 1.0)  # it neither compiles nor decodes
    beside = teacher.weights + teacher.activations + head + 1.0 + 1.0
    assert teacher.cache == pytest.approx(max(0.0, 0.9 * gpu_gib - beside))


def test_a_teacher_that_writes_takes_what_a_rollout_engine_takes_but_for_weights_under_way() -> None:
    workers = memory("teachers.main.backend=vllm-generate", student="8B", teacher="8B")
    writes, rollout = workers["teacher-main"], workers["rollout"]
    assert (writes.weights, writes.activations) == (rollout.weights, rollout.activations)
    assert (writes.logits, writes.head, writes.buffers) == (rollout.logits, 0.0, 0.0)
    assert writes.context == rollout.context - 0.5  # NCCL brings it nothing
    assert writes.engine == pytest.approx(0.9 * 80)
    assert memory("teachers.main.backend=vllm-generate", "teachers.main.engine.max_concurrent_sequences=64")[
        "teacher-main"
    ].logits == pytest.approx(64 * CONFIGS["8B"].vocab_size * 12 / GIB)


@pytest.mark.parametrize(("gpu_gib", "tokens"), [(24.0, 25_700), (48.0, 183_000), (80.0, 392_800), (141.0, 792_600)])
def test_an_8b_teacher_holds_by_hand(gpu_gib: float, tokens: int) -> None:
    # 0.9 x GPU - 15.26 of weights and head - 0.81 of activations - 2.0, over 144 KiB a token: 21.6 - 18.07 GiB times
    # 7,282 tokens, 43.2 - 18.07, 72.0 - 18.07, 126.9 - 18.07.
    found = memory(gpu_gib=gpu_gib)["teacher-main"].cache_tokens
    assert found == pytest.approx(tokens, rel=0.005)


def test_teachers_of_a_slot_leave_room_for_those_that_sleep() -> None:
    slot = [f"teachers.{name}={{model='t', slot='one'}}" for name in ("main", "b", "c", "d")]
    sizes = {STUDENT: size("0.6B"), **dict.fromkeys(("main", "b", "c", "d"), size("8B"))}
    alone = memory(gpu_gib=24.0)["teacher-main"]
    four = estimate(make_config(*slot), sizes, Lengths(2048), 24.0)["teacher-c"]
    # Three that sleep keep a context and a workspace each, and 0.5 stay free: (24 - 3.0 - 0.5) / 24 = 0.8541.
    assert four.context == pytest.approx(alone.context + 3.0)
    assert four.engine == pytest.approx(0.854 * 24)
    assert four.cache == pytest.approx(20.50 - 18.07, abs=0.02)
    assert four.sequences == pytest.approx(four.cache * 7282 / 2048, rel=0.01)


def test_ranks_of_an_engine_share_weights_and_keys_but_have_copies_beyond_the_keys() -> None:
    two = memory("teachers.main.engine.tensor_parallel=2")["teacher-main"]
    assert two.weights + two.head == pytest.approx(8_190_735_360 * 2 / 2 / GIB)
    assert two.cache_tokens == pytest.approx(two.cache * GIB / (147_456 / 2), abs=1)
    sixteen = memory("teachers.main.engine.tensor_parallel=16")["teacher-main"]
    assert sixteen.cache_tokens == pytest.approx(sixteen.cache * GIB / (147_456 / 8), abs=1)


def test_a_quantised_teacher_keeps_embedding_and_head_in_bfloat16() -> None:
    fp8 = memory("teachers.main.engine.quantization='fp8_per_tensor'")["teacher-main"]
    kept = 2 * 151_936 * 4096
    assert fp8.weights + fp8.head == pytest.approx((kept * 2 + (8_190_735_360 - kept)) / GIB)
    awq = {"quant_method": "awq", "bits": 4}
    four = size_of(type(CONFIGS["8B"])(**{**CONFIGS["8B"].to_dict(), "quantization_config": awq}))
    assert four.weight_bytes(2) == kept * 2 + (8_190_735_360 - kept) / 2
    # A tied one is kept once: 0.6B.
    assert size("0.6B").weight_bytes(2, quantized=True) == 2 * 151_936 * 1024 + (596_049_920 - 151_936 * 1024)


def test_a_cache_in_fp8_holds_twice_as_many_tokens() -> None:
    usual, short = memory(), memory("rollout.engine.extra.kv_cache_dtype='fp8'")
    assert short["rollout"].cache_tokens == pytest.approx(2 * (usual["rollout"].cache_tokens or 0), abs=2)


def test_stage_2_keeps_whole_weights_and_shards_the_rest() -> None:
    alone, of_four = memory()["learner"], memory("learner.num_workers=4")["learner"]
    assert alone.weights == of_four.weights == pytest.approx(1_720_574_976 * 2 / GIB)
    # float32: gradients 4 bytes, masters 4, moments 8
    assert alone.gradients == pytest.approx(1_720_574_976 * 4 / GIB)
    assert alone.optimizer == pytest.approx(1_720_574_976 * 12 / GIB)
    assert of_four.optimizer == pytest.approx(alone.optimizer / 4)
    assert of_four.gradients == pytest.approx(alone.gradients / 4)
    third = memory("learner.num_workers=4", "learner.zero_stage=3")["learner"]
    assert third.weights == pytest.approx(alone.weights / 4)
    assert memory("learner.offload_optimizer=cpu")["learner"].optimizer == 0
    # Plain torch in float32: the weights are the masters.
    plain = memory("learner.zero_stage=0", "learner.dtype=float32")["learner"]
    assert (plain.weights, plain.optimizer) == pytest.approx((alone.weights * 2, 1_720_574_976 * 8 / GIB))


@pytest.mark.parametrize(
    ("student", "overrides", "bytes_per_parameter"),
    [
        ("8B", ("learner.num_workers=8",), 2 + 16 / 8),  # gradients 4, masters 4, moments 8
        ("32B", ("learner.num_workers=8", "learner.zero_stage=3"), 18 / 8),
        ("32B", ("learner.num_workers=8", "learner.zero_stage=3", "learner.offload_optimizer=cpu"), 6 / 8),
        ("70B", ("learner.num_workers=16", "learner.zero_stage=3"), 18 / 16),
    ],
)
def test_a_rank_has_its_part_of_18_bytes_a_parameter(
    student: str, overrides: tuple[str, ...], bytes_per_parameter: float
) -> None:
    learner = memory(*overrides, student=student)["learner"]
    found = learner.weights + learner.gradients + learner.optimizer
    assert found == pytest.approx(PARAMETERS[student] * bytes_per_parameter / GIB)


@pytest.mark.parametrize(("student", "layers", "width", "inner"), [("8B", 36, 4096, 12288), ("70B", 80, 8192, 28672)])
def test_activations_of_a_micro_batch_by_hand(student: str, layers: int, width: int, inner: int) -> None:
    beside = 6 * width + 2 * (3 * inner + 4 * width)  # the last norm, and the gradients of one layer
    whole = memory("learner.micro_batch_tokens=8192", student=student)["learner"]
    assert whole.activations == pytest.approx(8192 * (layers * KEPT_BYTES[student] + beside) / GIB)
    again = memory("learner.micro_batch_tokens=8192", "learner.gradient_checkpointing=true", student=student)
    kept = layers * width * 2 + KEPT_BYTES[student] + beside
    assert again["learner"].activations == pytest.approx(8192 * kept / GIB)
    assert (whole.activations > 55) == (student in ("8B", "70B"))  # too much beside 18 bytes a parameter of 8B


def test_a_micro_batch_has_no_more_than_a_step_and_no_less_than_the_longest_trajectory() -> None:
    few = memory("prompts.prompts_per_step=2", "learner.micro_batch_tokens=8192")["learner"]
    assert few.activations == memory("learner.micro_batch_tokens=4096")["learner"].activations
    long = memory("learner.micro_batch_tokens=4096", tokens=6000)["learner"]
    assert long.activations == memory("learner.micro_batch_tokens=6000")["learner"].activations


def test_heads_logits_and_states_of_whole_distributions_lie_on_the_learners_gpu() -> None:
    own, whole = memory(), memory("objective.support=full")
    by_student = 151_936 * 2048 * (4 + 2) / GIB  # the head's gradient in float32, and in bfloat16 for autograd
    assert own["learner"].head == pytest.approx(by_student)
    assert whole["learner"].head == pytest.approx(by_student + 151_936 * 4096 * 2 / GIB)
    assert (own["learner"].logits, whole["learner"].logits) == (3.0, 4.0)  # GiB of a chunk
    states = whole["learner"].buffers - own["learner"].buffers
    assert states == pytest.approx(8192 * 4096 * 2 / GIB)


def test_buffers_are_zeros_buckets_and_weights_under_way() -> None:
    # Gradients in bfloat16 and their copies in float32, 5e8 at once or, below 32 GiB, 1e8; and the largest tensor.
    embedding = 151_936 * 2048 * 2
    assert memory()["learner"].buffers == pytest.approx((5e8 * 6 + embedding) / GIB)
    assert memory(gpu_gib=24.0)["learner"].buffers == pytest.approx((1e8 * 6 + embedding) / GIB)
    small = "learner.deepspeed={zero_optimization={reduce_bucket_size=70000000}}"
    assert memory(small)["learner"].buffers == pytest.approx((7e7 * 6 + embedding) / GIB)
    plain = memory("learner.zero_stage=0", "weight_sync.transport=object_store")
    assert (plain["learner"].buffers, plain["rollout"].buffers) == (0, pytest.approx(embedding / GIB))
    assert memory()["rollout"].buffers == pytest.approx(2 * embedding / GIB)  # as it comes, and as it is loaded


def test_an_average_of_the_student_is_kept_beside_the_masters() -> None:
    text = 'student.model = "s"\nprompts.train = "p"\n' + "".join(
        f'teachers.{name}.from = "student"\nteachers.{name}.refresh = {refresh}\n'
        for name, refresh in {"a": "{ ema = 0.1 }", "b": "{ every = 2 }", "c": '"live"', "d": '"frozen"'}.items()
    )
    config = parse_run_config(text, ["learner.num_workers=4"])
    learner = estimate(config, {STUDENT: size("1.7B")}, Lengths(2048), 80.0)["learner"]
    assert learner.optimizer == pytest.approx(1_720_574_976 * (12 + 2 * 4) / 4 / GIB)


def test_without_a_gpu_all_share_the_nodes_memory() -> None:
    found = memory("rollout.engine.kv_cache_gib=2", gpu_gib=None)
    assert {one.available for one in found.values()} == {None}
    assert (found["rollout"].cache, found["teacher-main"].cache) == (2.0, 1.0)
    assert all(one.fits for one in found.values())


def test_a_teacher_that_reads_longer_prompts_has_room_for_fewer_of_them() -> None:
    def sequences(scoring_tokens: int) -> float | None:
        sizes = {STUDENT: size("1.7B"), "main": size("8B")}
        lengths = Lengths(1024, lambda name: scoring_tokens)
        return estimate(make_config(), sizes, lengths, 80.0)["teacher-main"].sequences

    longer, same = sequences(4096), sequences(1024)
    assert longer is not None
    assert same is not None
    assert longer == pytest.approx(same / 4, rel=0.02)


def test_chunks_of_logits_are_those_that_learner_and_teachers_cut() -> None:
    assert LEARNED_LOGITS == {True: completion_head.GPU_CHUNK_LOGITS, False: completion_head.CPU_CHUNK_LOGITS}
    assert SCORED_LOGITS == {True: token_scores.GPU_CHUNK_LOGITS, False: token_scores.CHUNK_LOGITS}
