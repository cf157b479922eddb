"""Defines what a teacher backend must do, and finds the one that a run file names.

Importing this loads no backend: the driver asks a backend's class before any actor starts, and an actor sets the
environment of vLLM and OpenMP first.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pyarrow as pa

from cluster.config.run_config import Config
from cluster.config.stages import GENERATING, ROLLOUT_ENGINES, TeacherConfig
from cluster.contracts.errors import ConfigError, PreceptorError, RolloutError
from cluster.contracts.import_path import is_import_path, load_object
from cluster.contracts.metrics import Metrics
from cluster.contracts.requests import Completion, SamplingSettings, ScoreRequest
from cluster.contracts.signals import Scores

if TYPE_CHECKING:
    from cluster.models.model_checks import ModelFacts

Answer = tuple[Scores, Metrics] | tuple[Scores, Metrics, int]  # the last: of weights that are not the backend's own


class TeacherBackend(Protocol):
    """Scores the sampled tokens of trajectories with one teacher; one object per actor, made in its event loop.

    The driver asks the class: `signals`, `can_generate`, `fault`, `sampling_fault`, `check`, `identity` and `absence`
    need no object or hardware.
    """

    signals: ClassVar[frozenset[str]]  # names that requests may contain; those at import paths as the run file has them
    reads_scorer_prompts: ClassVar[bool] = False  # whether `score` reads rows as `as_read_by` gives them
    takes_weights: ClassVar[bool] = False  # whether it has the verbs of weight updates; needed to follow the student
    can_generate: ClassVar[bool] = False  # whether vLLM can serve teachers.NAME.model, to measure the teacher itself

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Start to serve a teacher.

        Args:
            teacher: its section of the run file; what `model` means is the backend's to say.
            max_model_len: at least the tokens of the longest trajectory.
            sleeps: whether `sleep` and `wake` will be called, because teachers share the hardware.
        """

    @classmethod
    def fault(cls, teacher: TeacherConfig, request: ScoreRequest) -> str | None:
        """Return what of a request the backend cannot answer, as a sentence; None if it can answer all of it."""
        missing = ", ".join(sorted(request.signals - cls.signals))
        backend = f"its backend '{teacher.backend}' does not send {missing}"
        return f"{backend}, which the objective or teachers.NAME.signals need" if missing else None

    @classmethod
    def sampling_fault(cls, teacher: TeacherConfig) -> str | None:
        """Return why the backend has no `generate` to write for rollout.privileged; None if it has."""
        return f"its backend '{teacher.backend}' scores and writes nothing; set backend = '{GENERATING}'"

    @classmethod
    def check(cls, teacher: TeacherConfig, student: "ModelFacts") -> "ModelFacts":
        """Return the teacher's tokenizer, context and vocabulary, and refuse what cannot work.

        A teacher that has no tokenizer reads the student's token ids as they are: it returns the student's facts.

        Raises:
            PreceptorError: something is missing, damaged or does not fit.
        """

    @classmethod
    def identity(cls, teacher: TeacherConfig) -> str:
        """Return a fingerprint of what answers, which differs as soon as the answers may."""

    @classmethod
    def absence(cls, teacher: TeacherConfig) -> str:
        """Return why what answers cannot be reached now, as half a sentence; "" if it can, or is of this run."""
        return ""

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> Answer:
        """Return the signals of `request.signals` for all tokens whose loss_mask is 1, and metrics of the backend.

        A backend whose weights are not its own also returns the version of those that scored.

        The token at position t is predicted from those before it. Rows come one after the other, as in
        `rollout_logprobs`; a row may have several sampled spans, or none. Candidates that a teacher chooses may not
        depend on which token was sampled: what corrects the tail of a top-k divergence would be biased.

        Raises:
            ScoreError: the scores cannot be training data.
        """

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Sample one completion in the student's tokens; those of the lowest `priority` run first.

        Raises:
            RolloutError: the request is refused or given up.
        """
        raise RolloutError(f"{type(self).__name__} scores, and samples no completions")

    @property
    def is_dead(self) -> bool:
        """Return whether a process of the backend is gone, so that the actor must start again."""
        return False

    async def sleep(self) -> None:
        """Give the hardware back to another backend; no score is requested until `wake`."""

    async def wake(self) -> None:
        """Take the hardware again."""

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end of weight updates, once."""

    async def start_weight_update(self) -> None:
        """Get ready to receive weights; no score is requested until they are installed."""

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket, whose bytes `update_info["buffer"]` keeps."""

    async def finish_weight_update(self, policy_version: int) -> str:
        """Install the weights, drop what was computed with the old ones, and return the received checksum."""

    async def shutdown(self) -> None:
        """End every process that the backend started."""


BACKENDS = {
    "vllm": "teacher_workers.backends.vllm:VllmBackend",
    "http": "teacher_workers.backends.http:HttpBackend",
    GENERATING: "teacher_workers.backends.generating:GeneratingBackend",
    ROLLOUT_ENGINES: "teacher_workers.backends.rollout_engines:RolloutEnginesBackend",
}
ALIGNED_BACKEND = "teacher_workers.backends.aligned:AlignedBackend"  # around another, where tokenizers differ


def find_backend(teacher: TeacherConfig) -> type[TeacherBackend]:
    """Return the class of `teachers.NAME.backend`, a name in BACKENDS or an import path; else raise ConfigError."""
    if teacher.is_aligned:
        aligned: type[TeacherBackend] = load_object(ALIGNED_BACKEND, "a teacher backend")
        return aligned
    name = teacher.backend
    if not is_import_path(name) and name not in BACKENDS:
        raise ConfigError(f"there is no teacher backend '{name}'; expected one of {sorted(BACKENDS)} or an import path")
    backend: type[TeacherBackend] = load_object(BACKENDS.get(name, name), "a teacher backend")
    if TeacherBackend not in getattr(backend, "__mro__", ()):
        raise ConfigError(f"'{name}' is no teacher backend; it must be a subclass of {TeacherBackend.__name__}")
    return backend


def check_signals(config: Config) -> None:
    """Raise ConfigError if a teacher's backend cannot answer what the run requests of it."""
    sampler = config.sampling_teacher
    if sampler is not None:
        teacher = config.teachers[sampler]
        if fault := find_backend(teacher).sampling_fault(teacher):
            raise ConfigError(f"teachers.{sampler}: it is to write (rollout.privileged.sampler), but {fault}")
    requested = {scorer: None for route in config.routes for scorer in config.scorers(route)}
    for name, request in requested:
        teacher = config.teachers[name]
        backend = find_backend(teacher)
        if fault := backend.fault(teacher, request):
            raise ConfigError(f"teachers.{name}: {fault}")
        if request.compared_rows:
            again = ScoreRequest(request.model, given_candidates=True)
            if fault := backend.fault(teacher, again):
                raise ConfigError(f"teachers.{name}: context.compared_rows: {fault}")
        if teacher.context is not None and not backend.reads_scorer_prompts:
            raise ConfigError(
                f"teachers.{name}: its backend '{teacher.backend}' reads the student's prompt alone; remove the "
                "context, or let the backend read `as_read_by` and set reads_scorer_prompts"
            )


def check_teacher(name: str, teacher: TeacherConfig, student: "ModelFacts") -> "ModelFacts":
    """Return what the backend says of a teacher; what it raises begins with the teacher's name."""
    backend = find_backend(teacher)
    try:
        if teacher.receives_weights and not backend.takes_weights:
            raise ConfigError(f"its backend '{teacher.backend}' takes no weights; leave refresh = 'frozen'")
        return backend.check(teacher, student)
    except PreceptorError as error:
        raise type(error)(f"teachers.{name}: {error}") from error
