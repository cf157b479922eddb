from cluster.config.sections import StudentConfig
from cluster.demo import EMBEDDED
from cluster.models.model_size import ModelSize, model_size


def test_the_embedded_student_is_counted_from_its_configuration() -> None:
    size = model_size(StudentConfig(str(EMBEDDED / "student")))
    # Embedding 112 x 96, tied. Each of three layers: queries and output 96 x 128 each, keys and values 96 x 64 each,
    # feed-forward 3 x 96 x 256, norms 2 x 96 and 2 x 32. A last norm of 96.
    layer = 2 * 96 * 128 + 2 * 96 * 64 + 3 * 96 * 256 + 2 * 96 + 2 * 32
    widths = {"query_width": 128, "kv_width": 64, "heads": 4, "kv_heads": 2}
    parameters = 112 * 96 + 3 * layer + 96
    assert size == ModelSize("qwen3", parameters, 3, 96, 256, 112, **widths, norms_queries=True, is_tied=True)
    assert size.kv_values_per_token == 2 * 3 * 64
    assert size.describe() == "qwen3, 343k parameters"
