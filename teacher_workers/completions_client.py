"""Asks completion servers for the log-probabilities of given token ids; asks again, and elsewhere, when one fails.

Two forms of `POST /completions` are understood, and an answer shows which one a server has: vLLM's `prompt_logprobs`,
whose entries are token ids, and OpenAI's `echo` with `logprobs`, whose entries are texts. A text names no id, unless it
is vLLM's "token_id:N", so of such servers only the given tokens' own scores are read.
"""

import asyncio
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx
import msgspec

from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import NotFiniteError, ScoreError, WrongLengthError
from cluster.contracts.trajectory import Ints

CONNECT_SECONDS = 10.0
FIRST_REST_SECONDS = 0.25  # of a server that failed; doubled by every further failure
LONGEST_REST_SECONDS = 10.0
FAULT_SECONDS = 30.0  # of one row's retries of answers 500
MOST_POSITIVE = 1e-3  # nats; what rounding may put a log-probability above 0
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})  # the server may answer the same request later
NO_NUMBER = re.compile(rb"\b(NaN|Infinity)\b")
ID_PREFIX = "token_id:"
NO_LOGPROBS = "answers without log-probabilities of the prompt"

Answer = TypeVar("Answer")


class TokenScore(msgspec.Struct, frozen=True, gc=False):
    """Holds what a server says of one token at one position."""

    logprob: float
    decoded_token: str | None = None


Position = dict[int, TokenScore]  # by token id: the token that stands there, and the most likely ones


class _Echo(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    prompt_logprobs: list[Position | None] | None = None
    logprobs: _Echo | None = None

    @property
    def is_empty(self) -> bool:
        return self.prompt_logprobs is None and self.logprobs is None

    def positions(self, ids: list[int]) -> list[Position | None]:
        """Return what is said of each token of the prompt; nothing of the first, which no token stands before."""
        if self.prompt_logprobs is not None or self.logprobs is None:
            return self.prompt_logprobs or []
        echo, positions = self.logprobs, list[Position | None]()
        tops = echo.top_logprobs or [None] * len(echo.tokens)
        for token_id, token, logprob, top in zip(ids, echo.tokens, echo.token_logprobs, tops, strict=False):
            named = {_id(name): TokenScore(value) for name, value in (top or {}).items()}
            position = {other: score for other, score in named.items() if other is not None}
            if logprob is not None:
                own = _id(token)
                position[token_id if own is None else own] = TokenScore(logprob, token if own is None else None)
            positions.append(position or None)
        return positions


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class Written(msgspec.Struct):
    """Holds what a server samples."""

    token_ids: list[int] | None = None
    logprobs: _Echo | None = None
    finish_reason: str | None = None


class _Sampled(msgspec.Struct):
    choices: list[Written]


class ServedModel(msgspec.Struct, frozen=True):
    """Describes a model that a server lists; all but the name is vLLM's own."""

    id: str
    root: str | None = None  # the folder or hub id behind the name
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[ServedModel]


class _PassingError(Exception):
    """A server failed in a way that may be over at the next try."""

    def __init__(self, message: str, patience_seconds: float = math.inf) -> None:
        super().__init__(message)
        self.patience_seconds = patience_seconds  # after which it counts as lasting


class _RefusedError(ScoreError):
    """A server does not take the request as it is."""


@dataclass
class _Server:
    url: str
    in_flight: int = 0
    num_failures: int = 0  # one after the other
    rests_until: float = 0.0  # on the monotonic clock

    @property
    def burden(self) -> tuple[bool, int]:
        return self.rests_until > time.monotonic(), self.in_flight

    def rest(self, sent_at: float) -> None:
        """Note a failure; of requests that were under way together, one counts."""
        if sent_at >= self.rests_until:
            self.num_failures += 1
            rest_seconds = min(LONGEST_REST_SECONDS, FIRST_REST_SECONDS * 2.0 ** min(self.num_failures - 1, 16))
            self.rests_until = time.monotonic() + rest_seconds


class CompletionsClient:
    """Sends the requests of one process to the servers of one teacher; made in a running event loop."""

    def __init__(self, teacher: TeacherConfig, retry_seconds: float | None = None) -> None:
        """Prepare to ask; connects to no server yet. `retry_seconds` replaces the teacher's."""
        self._model, self._api_key_env = teacher.model, teacher.api_key_env
        self._key = _api_key(teacher)
        self._timeout_seconds = teacher.request_timeout_seconds
        self._retry_seconds = teacher.retry_seconds if retry_seconds is None else retry_seconds
        self._servers = [_Server(url) for url in teacher.urls]
        in_flight = teacher.engine.concurrent_sequences
        self._slots = asyncio.Semaphore(in_flight)
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
            verify=any(url.startswith("https:") for url in teacher.urls),  # reading certificates takes a moment
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
        )
        self._echoes: bool | None = None  # whether the servers' form is OpenAI's; None: no answer has shown it yet
        self.num_retries = 0

    async def close(self) -> None:
        await self._http.aclose()

    async def list_models(self) -> tuple[str, list[ServedModel]]:
        """Return the URL of a server that answers, and the models that it lists."""
        return await self._ask("GET", "/models", _read_models)

    async def served_model(self) -> ServedModel:
        """Return how the servers list the model; raise ScoreError if they do not serve it."""
        url, models = await self.list_models()
        for model in models:
            if model.id == self._model:
                return model
        raise ScoreError(
            f"{url} serves {', '.join(model.id for model in models) or 'no model'}, and not '{self._model}'; "
            "set teachers.NAME.model to a name that it serves"
        )

    async def score(self, token_ids: Ints, top_k: int) -> list[Position]:
        """Return what the servers say of every token but the first, each with its `top_k` most likely ones.

        Raises:
            ScoreError: no server answered in time, one refused, or its answer is none about these tokens
                (WrongLengthError, NotFiniteError).
        """
        ids, refusals, url = token_ids.tolist(), [], ""
        for echoes in (False, True) if self._echoes is None else (self._echoes,):
            try:
                read, body = partial(self._read, echoes), self._body(ids, top_k, echoes)
                url, choice = await self._ask("POST", "/completions", read, body)
            except _RefusedError as error:
                refusals.append(error)
                continue
            if not choice.is_empty:
                self._echoes = echoes
                return _checked(url, choice.positions(ids), ids, top_k)
        if refusals:
            raise refusals[0]
        raise ScoreError(f"{url} {NO_LOGPROBS}; a teacher needs vLLM's prompt_logprobs, or echo with logprobs")

    async def generate(self, prompt_ids: Sequence[int], settings: Mapping[str, Any]) -> Written:
        """Return a completion that a server samples by settings of its own names; its ids and log-probabilities.

        Raises:
            ScoreError: no server answered in time, one refused, or its answer names no ids.
        """
        asked = {"logprobs": 1, "return_token_ids": True}  # vLLM's own; others ignore the latter
        body = {"model": self._model, "prompt": [int(token_id) for token_id in prompt_ids], **asked, **settings}
        url, written = await self._ask("POST", "/completions", _read_written, body)
        if written.token_ids is None or written.logprobs is None:
            raise ScoreError(f"{url} answers without token ids and log-probabilities; to write, a teacher needs vLLM's")
        if len(written.token_ids) != len(written.logprobs.token_logprobs) or None in written.logprobs.token_logprobs:
            raise ScoreError(f"{url} answers {len(written.token_ids)} tokens, not all of them with a log-probability")
        return written

    def _read(self, echoes: bool, url: str, content: bytes) -> _Choice:
        try:
            [choice] = msgspec.json.decode(content, type=_Completion).choices
        except ValueError as error:
            if no_number := NO_NUMBER.search(content):
                raise NotFiniteError(f"{url} answered {no_number[1].decode()} as a log-probability") from error
            raise ScoreError(f"{url} answered no list of log-probabilities: {error}") from error
        if choice.is_empty and self._echoes == echoes:  # a server that ends gives up what it was asked
            raise _PassingError(f"{url} {NO_LOGPROBS}")
        return choice

    def _body(self, ids: list[int], top_k: int, echoes: bool) -> dict[str, Any]:
        # One token is generated, since many servers refuse to generate none. Neither temperature nor top_p counts for
        # vLLM's prompt_logprobs; other servers may apply them.
        body = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        if not echoes:
            return body | {"prompt_logprobs": top_k}
        # vLLM names tokens by their ids and echoes ids without a text when asked to; others ignore that.
        ids_for_texts = {"return_tokens_as_token_ids": True, "return_token_ids": True}
        return body | {"echo": True, "logprobs": max(1, top_k), **ids_for_texts}

    async def _ask(
        self, method: str, path: str, read: Callable[[str, bytes], Answer], body: Any = None
    ) -> tuple[str, Answer]:
        """Return the URL that answered and what `read` makes of the answer; every failure that may pass is retried.

        The least burdened server is asked. One that failed rests, longer each time, and others are asked meanwhile.
        """
        async with self._slots:
            began = time.monotonic()
            while True:
                server, sent_at = min(self._servers, key=lambda server: server.burden), time.monotonic()
                try:
                    answer = read(server.url, await self._send(server, method, path, body))
                except _PassingError as failure:
                    server.rest(sent_at)
                    now = time.monotonic()
                    wait_seconds = max(0.0, min(server.rests_until for server in self._servers) - now)
                    if now + wait_seconds - began > min(self._retry_seconds, failure.patience_seconds):
                        tried = f" after {now - began:.0f} s of tries" if self._retry_seconds else ""
                        raise ScoreError(f"{failure}{tried}") from failure
                    self.num_retries += 1
                    await asyncio.sleep(wait_seconds)
                else:
                    server.num_failures = 0
                    return server.url, answer

    async def _send(self, server: _Server, method: str, path: str, body: Any) -> bytes:
        url = server.url + path
        server.in_flight += 1
        try:
            async with asyncio.timeout(self._timeout_seconds):
                answer = await self._http.request(method, url, json=body)
        except TimeoutError as error:
            raise _PassingError(f"{url} did not answer within {self._timeout_seconds:g} s") from error
        except httpx.TransportError as error:
            raise _PassingError(f"{url} cannot be reached: {error or type(error).__name__}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ScoreError(f"{url} cannot be asked: {error}") from error
        finally:
            server.in_flight -= 1
        if answer.status_code == httpx.codes.OK:
            return answer.content
        answered = f"{url} answered {answer.status_code}: {self._said(answer)}"
        if answer.status_code in PASSING_STATUS:
            # An engine that has died answers 500 until its server ends too; so does one that fails at this very row.
            patience_seconds = FAULT_SECONDS if answer.status_code == 500 else math.inf
            raise _PassingError(answered, patience_seconds)
        raise _RefusedError(f"{answered}{self._advice(answer.status_code)}")

    def _said(self, answer: httpx.Response) -> str:
        """Return what a server says about its refusal, without the key that it may repeat."""
        try:
            said = answer.json()
        except ValueError:
            said = None
        said = said.get("error", said) if isinstance(said, dict) else None
        said = said.get("message", said) if isinstance(said, dict) else said
        text = str(said) if said else answer.text or answer.reason_phrase
        return (text.replace(self._key, "***") if self._key else text)[:300]

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            if self._api_key_env is None:
                return "; name the environment variable that holds its key in teachers.NAME.api_key_env"
            return f"; it refuses the key in the environment variable {self._api_key_env}"
        if status == 404:
            return "; url ends before /completions, as http://host:8000/v1, and model is a name that the server has"
        return ""


def _api_key(teacher: TeacherConfig) -> str:
    if teacher.api_key_env is None:
        return ""
    key = os.environ.get(teacher.api_key_env, "")
    if not key:
        raise ScoreError(
            f"{teacher.urls[0]}: the environment variable {teacher.api_key_env} (api_key_env) is not set here; set it "
            "where preceptor, and Ray on every node, is started"
        )
    return key


def _read_written(url: str, content: bytes) -> Written:
    try:
        [written] = msgspec.json.decode(content, type=_Sampled).choices
    except ValueError as error:
        raise ScoreError(f"{url} answered no completion: {error}") from error
    return written


def _read_models(url: str, content: bytes) -> list[ServedModel]:
    try:
        return msgspec.json.decode(content, type=_ModelList).data
    except msgspec.DecodeError as error:
        raise ScoreError(f"{url}/models answered no list of models: {error}") from error


def _id(token: str) -> int | None:
    return int(token.removeprefix(ID_PREFIX)) if re.fullmatch(rf"{ID_PREFIX}\d+", token) else None


def _checked(url: str, positions: list[Position | None], ids: list[int], top_k: int) -> list[Position]:
    """Return the positions of all tokens but the first, which must be about these tokens."""
    if len(positions) != len(ids):
        raise WrongLengthError(
            f"{url} answered for {len(positions)} of {len(ids)} tokens; scores would belong to other tokens"
        )
    checked = []
    for index, (position, token_id) in enumerate(zip(positions[1:], ids[1:], strict=True), start=1):
        if position is None or token_id not in position:
            listed = "nothing" if not position else f"the ids {sorted(position)[:5]}"
            raise ScoreError(
                f"{url} lists {listed} for token {token_id} at position {index}; it scored other tokens than it "
                "was given"
            )
        if len(position) < top_k:
            raise ScoreError(
                f"{url} lists {len(position)} tokens of position {index} by their ids, and {top_k} are needed"
            )
        checked.append(position)
    highest = max((score.logprob for position in checked for score in position.values()), default=0.0)
    if highest > MOST_POSITIVE:
        raise ScoreError(
            f"{url} gives a log-probability of {highest:.4g}, which is above 0; it must answer log-softmax of the "
            "logits (vLLM: --logprobs-mode raw_logprobs)"
        )
    return checked
