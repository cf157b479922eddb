"""Measures a weight sync by Ray's object store beside a copy of its bytes: `python -m benchmarks.cases.weight_sync`.

The transport is everything but vLLM: the learner packs and checks, the object store takes the bytes, a process beside
a rollout actor maps and checks them. A whole sync has in addition vLLM's pause, its loading layer by layer and its
repacking for the kernels. Delta syncs follow real AdamW steps on real gradients in float32; bfloat16 travels.
Cases are run in turns with a copy of the same bytes; figures are medians. The hand-off of scored batches between
actors is measured the same way.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from benchmarks.cases.hand_off import hand_off_rows, signal_rows
from benchmarks.harness.mapping_actor import MappingActor
from benchmarks.harness.report import RESULTS, Row, print_rows, row, write_rows
from cluster.actors.cluster import PoolTimeouts
from cluster.config.sections import StudentConfig
from cluster.config.stages import Dtype, EngineConfig, LearnerConfig, WeightSyncConfig
from cluster.nodes.local_cluster import local_cluster
from cluster.weight_sync.manifest import Manifest, TensorSpec, WeightSyncReport, total_bytes
from learner.model.student import Student, load_student
from learner.weight_sync.object_store import ObjectStoreSender
from rollout_workers.pool import RolloutActorSettings, RolloutPool

COMMAND = "OMP_WAIT_POLICY=PASSIVE python -m benchmarks.cases.weight_sync"
ROOT = Path(__file__).resolve().parents[2]
MODELS = {"embedded": ROOT / "cluster/embedded/student", "smollm2": ROOT / "models/smollm2-student"}
DTYPE: Dtype = "bfloat16"
ENGINE = EngineConfig(dtype=DTYPE, kv_cache_gib=0.1, cpu_threads=1)
MAX_TRANSPORT = 2.0  # of a copy of the bytes
LEARNING_RATES = (1e-6, 1e-5)
BATCH, LENGTH = 2, 32  # tokens of the gradients
SYNTHETIC_TENSORS, SYNTHETIC_VALUES = 32, 4 << 20  # 256 MiB: one bucket
TIMEOUT_SECONDS = 300.0
FREEING_SECONDS = 0.2  # in which the store frees the last bucket, whose memory the next takes, as in a run


@dataclass(frozen=True)
class SyncEngine:
    """What a sender needs of a TrainEngine, over plain parameters."""

    student: Any  # has `manifest(dtype)`
    parameters: dict[str, torch.Tensor]
    rank: int = 0

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Give whole parameters."""
        yield {name: self.parameters[name].detach() for name in names}


class Synthetic:
    """A student that has a manifest and nothing else."""

    def manifest(self, dtype: str) -> Manifest:
        """Describe parameters of equal size."""
        names = [f"layer{index}" for index in range(SYNTHETIC_TENSORS)]
        return [TensorSpec(name, (SYNTHETIC_VALUES,), dtype) for name in names]


def main() -> int:
    """Measure and write the rows; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.weight_sync", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="whose whole syncs are timed")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-weight_sync.json")
    options = parser.parse_args()
    with sync_cluster():
        rows = [*transport_rows("synthetic", synthetic_engine(), options.repeats)]
        for name, folder in ((name, MODELS[name]) for name in options.models):
            if (folder / "model.safetensors").is_file():
                rows += model_rows(name, folder, options.repeats)
            else:
                print(f"{name}: not measured, there is no {folder.relative_to(ROOT)}")
        rows += [*hand_off_rows(options.repeats), *signal_rows()]
    print_rows(rows)
    write_rows(options.output, COMMAND, rows)
    return 0 if all(found["met"] for found in rows if "met" in found) else 1


@contextmanager
def sync_cluster() -> Iterator[None]:
    """Start a cluster in which every actor sees all cards and has one thread."""
    # What the packages come from, too, where they are installed nowhere.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    # Ray would hide the cards from actors that ask for none.
    environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    with local_cluster(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    ):
        yield


def synthetic_engine() -> SyncEngine:
    """Return parameters that fill one bucket."""
    names = [tensor.name for tensor in Synthetic().manifest(DTYPE)]
    return SyncEngine(Synthetic(), {name: torch.ones(SYNTHETIC_VALUES, dtype=torch.bfloat16) for name in names})


def transport_rows(name: str, engine: SyncEngine, repeats: int) -> list[Row]:
    """Time pack, put, map and check, and copying as many bytes, in turns."""
    actor = ray.remote(MappingActor).options(num_cpus=1).remote()
    publish = Publisher(engine, "full", [actor])
    manifest: Manifest = engine.student.manifest(DTYPE)
    copy = Copy(total_bytes(manifest))
    reports = [publish(copy) for _ in range(repeats + 1)][1:]
    ray.kill(actor)
    transport, copying = statistics.median(found.seconds for found in reports), copy.median()
    size = f"{name}, {total_bytes(manifest) / 1e6:.1f} MB"
    ratio = row("transport / memcpy", size, transport / copying, "ratio")
    if name == "synthetic":  # where bytes take the time, and not the calls
        ratio |= {"bar": f"<= {MAX_TRANSPORT:g}", "met": ratio["value"] <= MAX_TRANSPORT}
    return [
        row("memcpy of the bytes", size, copying, "s"),
        row("transport: pack, put, map, check", size, transport, "s"),
        ratio,
    ]


def model_rows(name: str, folder: Path, repeats: int) -> list[Row]:
    """Time transport and whole syncs of a model: full, and delta after steps with each learning rate."""
    student = load_student(StudentConfig(str(folder)), LearnerConfig(dtype="float32"))
    engine = SyncEngine(student, dict(student.causal_lm.named_parameters()))
    sizes = TensorSpec("all", (sum(value.numel() for value in engine.parameters.values()),), DTYPE)
    size = f"{name}, {sizes.num_bytes / 1e6:.1f} MB"
    rows = transport_rows(name, engine, repeats)
    with rollout_pool(folder) as actors:
        publish, copy = Publisher(engine, "full", actors), Copy(sizes.num_bytes)
        full = [publish(copy) for _ in range(repeats + 1)][1:]
        seconds = statistics.median(found.seconds for found in full)
        rows += [
            row("sync, full", size, seconds, "s"),
            row("of which paused, full", size, median_pause(full), "s"),
            row("of which vLLM: pause, load, repack", size, seconds - rows[1]["value"], "s"),
            row("sync, full / memcpy", size, seconds / copy.median(), "ratio"),
        ]
        initial = {key: value.detach().clone() for key, value in engine.parameters.items()}
        for learning_rate in LEARNING_RATES:
            with torch.no_grad():
                for key, value in engine.parameters.items():
                    value.copy_(initial[key])
            rows += delta_rows(size, engine, actors, learning_rate, repeats)
    return rows


def delta_rows(
    size: str, engine: SyncEngine, actors: Sequence[ActorHandle], learning_rate: float, repeats: int
) -> list[Row]:
    """Time delta syncs, each after one more optimizer step, of which the first is AdamW's first."""
    publish = Publisher(engine, "delta", actors)
    whole = publish(None)
    optimizer = torch.optim.AdamW(engine.parameters.values(), learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    reports = []
    for seed in range(repeats):
        take_step(engine.student, optimizer, seed)
        reports.append(publish(None))
    case = f"{size}, lr {learning_rate:g}"
    num_bytes = statistics.median(found.num_bytes for found in reports)
    return [
        row("values changed by AdamW's first step", case, reports[0].changed_fraction or 0.0, "fraction"),
        row(
            "values changed by a step", case, statistics.median(r.changed_fraction or 0.0 for r in reports), "fraction"
        ),
        row("delta bytes / full bytes", case, num_bytes / whole.num_bytes, "ratio"),
        row("sync, delta", case, statistics.median(found.seconds for found in reports), "s"),
        row("of which paused, delta", case, median_pause(reports), "s"),
    ]


class Publisher:
    """Publishes one version after the other; versions of all publishers count up together."""

    version = 0

    def __init__(self, engine: Any, mode: Any, actors: Sequence[ActorHandle]) -> None:
        self._sender = ObjectStoreSender(engine, WeightSyncConfig(payload=mode), DTYPE, TIMEOUT_SECONDS)
        self._actors = actors

    def __call__(self, copy: "Copy | None") -> WeightSyncReport:
        """Send the weights, and then make a copy of as many bytes."""
        Publisher.version += 1
        report = self._sender.publish(self._actors, Publisher.version)
        if copy:
            copy()
        time.sleep(FREEING_SECONDS)
        return report


class Copy:
    """Copies bytes between memory that is at hand, and remembers the seconds."""

    def __init__(self, num_bytes: int) -> None:
        self._source, self._target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
        self._seconds: list[float] = []

    def __call__(self) -> None:
        """Copy once."""
        started = time.perf_counter()
        np.copyto(self._target, self._source)
        self._seconds.append(time.perf_counter() - started)

    def median(self) -> float:
        """Return the median seconds."""
        return statistics.median(self._seconds)


@contextmanager
def rollout_pool(folder: Path, engine: EngineConfig = ENGINE) -> Iterator[list[ActorHandle]]:
    """Start one real rollout actor with the model in bfloat16."""
    settings = RolloutActorSettings(StudentConfig(str(folder)), engine, LENGTH + 1, 4, "object_store")
    timeouts = PoolTimeouts(start_seconds=500, call_seconds=TIMEOUT_SECONDS)
    pool = RolloutPool(settings, [{"num_cpus": 1}], timeouts)
    pool.wait_until_ready()
    yield pool.actors
    pool.shutdown()


def take_step(student: Student, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Take an optimizer step on the cross-entropy of tokens that the student draws for itself, one after each place."""
    random = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(len(student.head.weight), (BATCH, LENGTH), generator=random)
    logits = student.causal_lm(input_ids=token_ids, use_cache=False).logits.flatten(0, 1)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random).squeeze(-1)
    torch.nn.functional.cross_entropy(logits, drawn).backward()
    optimizer.step()
    optimizer.zero_grad()


def median_pause(reports: Sequence[WeightSyncReport]) -> float:
    """Return the median seconds in which the workers did not generate."""
    return statistics.median(found.paused_seconds or 0.0 for found in reports)


if __name__ == "__main__":
    sys.exit(main())
