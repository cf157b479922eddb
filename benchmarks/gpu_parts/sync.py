"""Weight sync through Ray's object store, from a student on the card to an engine on the card."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cases.weight_sync import Publisher, SyncEngine, median_pause, rollout_pool, sync_cluster
from benchmarks.gpu_parts.loop import MAX_SYNC_SECONDS
from benchmarks.gpu_parts.shapes import Scale, model_folder
from benchmarks.harness.report import Row, at_most, row
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig, LearnerConfig
from learner.model.student import load_student

GPU_MEMORY_FRACTION = 0.3


def rows(scale: Scale, folder: Path, _seconds: float) -> Iterator[Row]:
    """Publish the whole student some times; the first time opens the way and is left out."""
    model = model_folder(scale, scale.student, folder)
    student = load_student(StudentConfig(str(model)), LearnerConfig(dtype=scale.dtype_name), scale.device)
    engine = SyncEngine(student, dict(student.causal_lm.named_parameters()))
    settings = EngineConfig(
        dtype="bfloat16",
        kv_cache_gib=0.1,
        cpu_threads=1 if scale.device.type == "cpu" else None,
        gpu_memory_fraction=GPU_MEMORY_FRACTION,
        enforce_eager=True,
    )
    with sync_cluster(), rollout_pool(model, settings) as actors:
        publish = Publisher(engine, "full", actors)
        reports = [publish(None) for _ in range(2 * scale.repeats + 1)][1:]
    size = f"{scale.student.name}, {reports[0].num_bytes / 1e6:.1f} MB"
    seconds = statistics.median(found.seconds for found in reports)
    yield at_most(row("sync, object store, full", size, seconds, "s"), MAX_SYNC_SECONDS)
    yield row("of which paused", size, median_pause(reports), "s")
