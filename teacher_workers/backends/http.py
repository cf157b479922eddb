"""Scores with servers that run elsewhere: `[teachers.NAME] url = "http://host:8000/v1"`.

Token ids go out and log-probabilities come back; no text is sent. The driver asks the servers first, for what a run
must know of them; each actor then sends its rows, one request a row, to the least burdened of them.
"""

import asyncio
import hashlib
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ModelError, RolloutError, ScoreError, UniformError
from cluster.contracts.metrics import Metrics, Sum
from cluster.contracts.requests import Completion, SamplingSettings, ScoreRequest
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import FLOOR, Scores
from cluster.contracts.trajectory import Bytes, FinishReason, Floats, Ints
from cluster.models.model_files import load_tokenizer
from teacher_workers.audit.checks import AGREEMENT_NATS, FLOOR_NATS, UNIFORM_NATS
from teacher_workers.backends.base import TeacherBackend
from teacher_workers.completions_client import CompletionsClient, Position, ServedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cluster.models.model_checks import ModelFacts

START_RETRY_SECONDS = 2.0  # of the driver's questions, before the run; the user waits for the answer
ABSENCE_SECONDS = 10.0  # without an answer, after which a server counts as away
PROBE_TOKENS = 32
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # in the text of a token that is a part of a character
MIN_EVEN_TOKENS = 8  # so many alike scores are no text's
WORKS = "objective.support 'sampled', 'topk' and 'intersection' work, without the teacher's entropy"

MAX_SPARE_TOKENS = 4
NEVER = -100.0  # added to a logit; servers take no lower one
LEAST_MASS = 1e-6  # of what is not excluded

Answer = TypeVar("Answer")
Listed = dict[int, float]  # log-probabilities of one position by token id

_log = logging.getLogger("preceptor")


class HttpBackend(TeacherBackend):
    """Sends rows to servers; needs no GPU, and no files of the teacher."""

    signals = frozenset({"logprobs", "candidate_ids", "candidate_logprobs"})
    reads_scorer_prompts = True

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Prepare to ask; a server that is away is waited for when it is needed."""
        self._client, self._urls = CompletionsClient(teacher), ", ".join(teacher.urls)
        self._teacher, self._excluded = teacher, frozenset(teacher.excluded_token_ids)
        self._retries_reported = 0

    @classmethod
    def fault(cls, teacher: TeacherConfig, request: ScoreRequest) -> str | None:
        """Also ask the servers for as many tokens per position as the request chooses."""
        if request.given_candidates:
            return f"{teacher.urls[0]} cannot score tokens that another model chose, which the objective needs; {WORKS}"
        missing = super().fault(teacher, request)
        if missing is not None:
            return f"{missing}; {WORKS}"
        if request.top_k:
            try:
                _run(_check_top_k(teacher, request.top_k + _spare(teacher, request.top_k)))
            except ModelError as error:
                return str(error)
        return None

    @classmethod
    def sampling_fault(cls, teacher: TeacherConfig) -> str | None:
        """Let every server write a token."""
        try:
            _run(_each(teacher, lambda client: client.generate([0], {"max_tokens": 1})))
        except ModelError as error:
            return str(error)
        return None

    @classmethod
    def check(cls, teacher: TeacherConfig, student: "ModelFacts") -> "ModelFacts":
        """Score a known row on every server, twice; say whose tokenizer is taken for the servers'."""
        models, tokenizer = _run(_probe(teacher, student.tokenizer)), student.tokenizer
        if teacher.tokenizer is not None:
            tokenizer = load_tokenizer(teacher.tokenizer, teacher.trust_remote_code)
        else:
            where = f"{teacher.model} at {', '.join(teacher.urls)}"
            _log.warning("%s is taken to have the student's tokenizer (teachers.NAME.tokenizer is not set)", where)
        contexts = [model.max_model_len for model in models if model.max_model_len]
        context_tokens = min(contexts, default=student.context_tokens)
        stop_ids = student.stop_ids if teacher.tokenizer is None else frozenset[int]()
        return replace(student, tokenizer=tokenizer, context_tokens=context_tokens, stop_ids=stop_ids)

    @classmethod
    def identity(cls, teacher: TeacherConfig) -> str:
        """Return a digest of the served name and of what the first server says is behind it."""
        model = served_model(teacher)
        return hashlib.sha256(f"{teacher.model}\n{model.root}".encode()).hexdigest()

    @classmethod
    def absence(cls, teacher: TeacherConfig) -> str:
        """Ask every server for its models; name those that do not answer."""
        absences = []
        for url in teacher.urls:
            server = msgspec.structs.replace(teacher, url=url, request_timeout_seconds=ABSENCE_SECONDS)
            try:
                _run(_each(server, CompletionsClient.served_model, retry_seconds=0.0))
            except ModelError as error:
                absences.append(str(error))
        return "; ".join(absences)

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics]:
        """Score all rows at once, as far as the client lets them."""
        token_ids, loss_mask = as_read_by(batch, request.model)
        rows = [(token_ids[row], loss_mask[row]) for row in range(len(token_ids))]
        parts = await asyncio.gather(*(self._score_row(ids, mask, request.top_k) for ids, mask in rows))
        logprobs, candidate_ids, candidate_logprobs = (np.concatenate(column) for column in zip(*parts, strict=True))
        _refuse_even(self._urls, logprobs)
        scores: dict[str, NDArray[Any]] = {"logprobs": logprobs}
        if request.top_k:
            scores |= {"candidate_ids": candidate_ids, "candidate_logprobs": candidate_logprobs}
        retries, self._retries_reported = self._client.num_retries - self._retries_reported, self._client.num_retries
        return scores, {f"{request.model}/retries": Sum(float(retries))}

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Sample one completion at a server; a stop id of a class is the class, with the id's own log-probability."""
        settings: dict[str, Any] = {
            "max_tokens": sampling.max_completion_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            "logit_bias": {str(token_id): NEVER for token_id in self._teacher.excluded_token_ids},
        }
        try:
            written = await self._client.generate(prompt_ids, {name: one for name, one in settings.items() if one})
        except ScoreError as error:
            raise RolloutError(str(error)) from error
        ids, stop_class = np.array(written.token_ids, np.int32), sampling.stop_class
        ids = np.where(np.isin(ids, stop_class), stop_class[:1] or 0, ids).astype(np.int32)
        logprobs = [] if written.logprobs is None else written.logprobs.token_logprobs
        reason: FinishReason = "length" if written.finish_reason == "length" else "stop"
        return Completion(ids, _clipped(np.array(logprobs, np.float32)), reason, np.zeros(len(ids), np.int32))

    async def shutdown(self) -> None:
        await self._client.close()

    async def _score_row(self, token_ids: Ints, loss_mask: Bytes, top_k: int) -> tuple[Floats, Ints, Floats]:
        """Return logprobs [sampled_tokens], and ids and logprobs [sampled_tokens, top_k] of the most likely tokens."""
        places = np.flatnonzero(loss_mask)
        count, stop_class = top_k + _spare(self._teacher, top_k), self._teacher.stop_class
        positions = await self._client.score(token_ids, count) if len(places) else []
        listed = [_merged(_without(positions[place - 1], self._excluded), stop_class) for place in places]
        sampled = np.where(np.isin(token_ids[places], stop_class), stop_class[:1] or 0, token_ids[places])
        return _columns(listed, sampled, top_k)


def served_model(teacher: TeacherConfig) -> ServedModel:
    """Return the model that a teacher's first server lists under `teacher.model`; without a name, the only one.

    Raises:
        ModelError: the server is away, does not serve it, or serves several.
    """
    if teacher.model:
        return _run(_each(teacher, CompletionsClient.served_model))[0]
    url, models = _run(_each(teacher, CompletionsClient.list_models))[0]
    if len(models) != 1:
        names = ", ".join(model.id for model in models) or "no model"
        raise ModelError(f"{url} serves {names}; name one of them with --teacher-model")
    return models[0]


def _spare(teacher: TeacherConfig, top_k: int) -> int:
    """Return how many tokens more than needed are asked for: excluded and merged ones may be among them."""
    merged = len(teacher.stop_class[1:])  # a server that names no ids lists the given token alone
    return min(len(teacher.excluded_token_ids) + (merged if top_k else min(1, merged)), MAX_SPARE_TOKENS)


def _without(position: Position, excluded: frozenset[int]) -> Listed:
    """Return the listed log-probabilities; those of excluded tokens go to the others, as far as they are listed."""
    listed = {token_id: score.logprob for token_id, score in position.items()}
    excluded_mass = sum(math.exp(logprob) for token_id, logprob in listed.items() if token_id in excluded)
    if not excluded_mass:
        return listed
    rest = math.log1p(-min(excluded_mass, 1 - LEAST_MASS))
    return {token_id: FLOOR if token_id in excluded else logprob - rest for token_id, logprob in listed.items()}


def _merged(listed: Listed, stop_class: Sequence[int]) -> Listed:
    """Return the listed log-probabilities, the class's under its first id; what is not listed counts as 0."""
    members = [math.exp(listed[token_id]) for token_id in stop_class if token_id in listed]
    if not members:
        return listed
    others = {token_id: logprob for token_id, logprob in listed.items() if token_id not in stop_class}
    return {stop_class[0]: math.log(sum(members)), **others}


def _columns(positions: list[Listed], sampled: Ints, top_k: int) -> tuple[Floats, Ints, Floats]:
    own = [position[int(token_id)] for position, token_id in zip(positions, sampled, strict=True)]
    # The sampled token is listed even if it is not among the most likely ones; then it is the last.
    best = [sorted(position.items(), key=lambda entry: -entry[1])[:top_k] for position in positions]
    ids = np.array([[token_id for token_id, _ in entries] for entries in best], np.int32)
    logprobs = np.array([[logprob for _, logprob in entries] for entries in best], np.float32)
    shape = (len(positions), top_k)
    return _clipped(np.array(own, np.float32)), ids.reshape(shape), _clipped(logprobs.reshape(shape))


def _clipped(logprobs: Floats) -> Floats:
    """Return log-probabilities in range: servers write minus infinity as -9999, and rounding may exceed 0."""
    clipped: Floats = np.clip(logprobs, FLOOR, 0.0)
    return clipped


def _refuse_even(where: str, logprobs: Floats) -> None:
    """Refuse scores that are all alike, unless the teacher is certain of every token."""
    if len(logprobs) >= MIN_EVEN_TOKENS and logprobs.std() <= UNIFORM_NATS and logprobs.mean() < -UNIFORM_NATS:
        raise UniformError(
            f"{where}: all {len(logprobs)} tokens were scored {logprobs.mean():.4f}, so the scores say nothing about "
            "them; the server's weights are missing or damaged"
        )


def _run(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Ask from outside an event loop, and raise what fails as a ModelError."""
    try:
        return asyncio.run(coroutine)
    except ScoreError as error:
        raise ModelError(str(error)) from error


async def _each(
    teacher: TeacherConfig,
    ask: Callable[[CompletionsClient], Awaitable[Answer]],
    retry_seconds: float = START_RETRY_SECONDS,
) -> list[Answer]:
    """Ask every server by itself, in the order of the URLs."""
    answers = []
    for url in teacher.urls:
        client = CompletionsClient(msgspec.structs.replace(teacher, url=url), retry_seconds)
        try:
            answers.append(await ask(client))
        finally:
            await client.close()
    return answers


async def _check_top_k(teacher: TeacherConfig, needed: int) -> None:
    """Raise ScoreError if a server lists fewer tokens per position; it is tried with fewer, to say how many."""
    ids = np.arange(2, dtype=np.int32)

    async def largest(client: CompletionsClient) -> int:
        try:
            await client.score(ids, needed)
            return needed
        except ScoreError:
            await client.score(ids, 0)  # raises what is wrong, if that is not the number
        works, refused = 0, needed
        while refused - works > 1:
            middle = (works + refused) // 2
            try:
                await client.score(ids, middle)
                works = middle
            except ScoreError:
                refused = middle
        return works

    for url, limit in zip(teacher.urls, await _each(teacher, largest), strict=True):
        if limit < needed:
            raise ScoreError(
                f"{url} lists up to {limit} tokens per position by their ids, and the objective compares {needed}; "
                f"lower objective.support_size, or start the server with --max-logprobs {needed}"
            )


async def _probe(teacher: TeacherConfig, tokenizer: "PreTrainedTokenizerBase") -> list[ServedModel]:
    """Score one row on every server, twice; raise ScoreError if an answer cannot be a teacher's of this student."""
    ids = _probe_ids(tokenizer)

    async def ask(client: CompletionsClient) -> tuple[ServedModel, list[list[Position]]]:
        return await client.served_model(), [await client.score(ids, 1) for _ in range(2)]

    tolerance = AGREEMENT_NATS[teacher.engine.dtype]
    answers = await _each(teacher, ask)
    scores = [[_own(positions, ids[1:]) for positions in twice] for _, twice in answers]
    for url, (_, (positions, _)), (first, again) in zip(teacher.urls, answers, scores, strict=True):
        _refuse_even(url, first)
        if (gap := _gap(first, again)) > tolerance:
            raise ScoreError(f"{url} scored the same tokens twice, {gap:.3g} nats apart; a teacher must repeat itself")
        if (gap := _gap(first, scores[0][0])) > tolerance:
            raise ScoreError(f"{url} and {teacher.urls[0]} score the same tokens {gap:.3g} nats apart; serve one model")
        if "tokens" not in teacher.accept_differences:
            _check_texts(url, positions, tokenizer)
    return [model for model, _ in answers]


def _probe_ids(tokenizer: "PreTrainedTokenizerBase") -> Ints:
    """Return ids from all over the vocabulary and the highest; of added ones, which may stand for images, no other."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    ids = sorted(token_id for token, token_id in vocabulary.items() if token not in added)
    spread = ids[:: max(1, len(ids) // (PROBE_TOKENS - 1))][: PROBE_TOKENS - 1]
    return np.array([*spread, max(vocabulary.values())], np.int32)


def _own(positions: list[Position], ids: Ints) -> Floats:
    own = [position[int(token_id)].logprob for position, token_id in zip(positions, ids, strict=True)]
    return np.array(own, np.float32)


def _gap(first: Floats, second: Floats) -> float:
    return float(np.abs(np.maximum(first, FLOOR_NATS) - np.maximum(second, FLOOR_NATS)).mean())


def _check_texts(url: str, positions: list[Position], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ScoreError if the server has another text for an id than the student, where neither is half a character."""
    known = set(tokenizer.get_vocab().values())
    for token_id, score in (entry for position in positions for entry in position.items()):
        theirs = score.decoded_token
        if theirs is None or token_id not in known:
            continue
        ours = tokenizer.decode([token_id])
        if theirs.strip() != ours.strip() and REPLACEMENT not in theirs + ours:
            raise ScoreError(
                f"{url} reads token {token_id} as {theirs!r} and the student as {ours!r}; a teacher must read the "
                "student's token ids as the same tokens"
            )
