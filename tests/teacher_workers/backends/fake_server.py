"""A small HTTP server with the answers of a completion server: each token's score depends on the one before it."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cluster.config.stages import TeacherConfig

VOCABULARY = 112  # of the embedded pair
Positions = list[dict[int, float] | None]


def make_table(seed: int = 0) -> NDArray[np.float64]:
    """Return [previous, next] log-probabilities."""
    logits = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)) * 3
    table: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return table


@dataclass
class FakeServer:
    """Answers as vLLM or as OpenAI does, or wrongly."""

    form: Literal["vllm", "echo", "echo of texts", "none"] = "vllm"
    model: str = "big"
    table: NDArray[np.float64] = field(default_factory=make_table)
    max_logprobs: int = 20
    max_model_len: int | None = 128
    key: str | None = None
    text: Callable[[int], str] | None = None  # of a token; None: no text is sent
    distort: Callable[[Positions], Positions] = lambda positions: positions
    body: Callable[[bytes], bytes] = lambda body: body
    failures: list[int] = field(default_factory=list)  # status codes of the next completions; the last one stays if < 0
    seconds: float = 0.0  # that a completion takes

    def __post_init__(self) -> None:
        self.requests: list[dict[str, Any]] = []  # bodies of the completions that it was asked for
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "FakeServer":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(*fake.models(self.headers.get("Authorization")))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._reply(*fake.complete(self.path, body, self.headers.get("Authorization")))

            def _reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:
                pass  # a client that went away

        self._http = Server(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()

    def models(self, authorization: str | None) -> tuple[int, bytes]:
        if self.key and authorization != f"Bearer {self.key}":
            return 401, json.dumps({"error": {"message": f"wrong key in {authorization}"}}).encode()
        card = {"id": self.model, "root": "org/big", "max_model_len": self.max_model_len}
        return 200, json.dumps({"data": [card]}).encode()

    def complete(self, path: str, body: dict[str, Any], authorization: str | None) -> tuple[int, bytes]:
        with self._lock:
            self.requests.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            failure = self.failures[0] if self.failures else 0
            if failure > 0:
                self.failures.pop(0)
        try:
            time.sleep(self.seconds)
            if failure:
                return abs(failure), json.dumps({"error": {"message": "no luck"}}).encode()
            if path != "/v1/completions" or body["model"] != self.model:
                return 404, json.dumps({"error": {"message": f"The model {body['model']} does not exist."}}).encode()
            return self._write(body) if body.get("return_token_ids") and not body.get("echo") else self._score(body)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _score(self, body: dict[str, Any]) -> tuple[int, bytes]:
        ids = body["prompt"]
        top_k = (
            body.get("prompt_logprobs") if self.form == "vllm" else body.get("logprobs") if body.get("echo") else None
        )
        if top_k is not None and top_k > self.max_logprobs:
            return 400, json.dumps({"error": {"message": f"{top_k} is greater than {self.max_logprobs}"}}).encode()
        positions: Positions = [None]
        for previous, token_id in pairwise(ids):
            row = self.table[previous]
            listed = [token_id, *np.argsort(-row, kind="stable")[: top_k or 0].tolist()]
            positions.append({one: float(row[one]) for one in listed})
        positions = self.distort(positions)
        choice: dict[str, Any] = {"index": 0, "text": "x"}
        if top_k is not None and self.form == "vllm":
            choice["prompt_logprobs"] = [position and self._entries(position) for position in positions]
        elif top_k is not None and self.form != "none":
            choice["logprobs"] = self._echo(ids, positions)
        return 200, self.body(json.dumps({"choices": [choice]}).encode())

    def _write(self, body: dict[str, Any]) -> tuple[int, bytes]:
        """Write the most likely tokens; one that may not be written is none of them."""
        ids, logprobs, last = list[int](), list[float](), body["prompt"][-1]
        excluded = {int(token_id) for token_id in body.get("logit_bias", {})}
        while len(ids) < body["max_tokens"] and (not ids or ids[-1] not in body.get("stop_token_ids", ())):
            best = next(one for one in np.argsort(-self.table[last]).tolist() if one not in excluded)
            ids.append(best)
            logprobs.append(float(self.table[last][best]))
            last = best
        reason = "stop" if ids[-1] in body.get("stop_token_ids", ()) else "length"
        choice: dict[str, Any] = {"text": "x", "finish_reason": reason}
        choice["logprobs"] = {"tokens": [f"token {one}" for one in ids], "token_logprobs": logprobs}
        if self.form == "vllm":
            choice["token_ids"] = ids
        return 200, self.body(json.dumps({"choices": [choice]}).encode())

    def _entries(self, position: dict[int, float]) -> dict[int, dict[str, Any]]:
        return {
            token_id: {"logprob": logprob, "rank": 1, "decoded_token": self.text and self.text(token_id)}
            for token_id, logprob in position.items()
        }

    def _echo(self, ids: list[int], positions: Positions) -> dict[str, Any]:
        name = "token_id:{}".format if self.form == "echo" else "text {}".format
        given = [*zip(ids, positions, strict=False), (7, {7: -0.5})]  # and the generated token
        return {
            "tokens": [name(token_id) for token_id, _ in given],
            "token_logprobs": [position and position[token_id] for token_id, position in given],
            "top_logprobs": [
                position and {name(token_id): logprob for token_id, logprob in position.items()}
                for _, position in given
            ],
        }


def teacher_at(*servers: FakeServer, **fields: Any) -> TeacherConfig:
    """Return a teacher that these servers have; no request to it is tried again."""
    urls = tuple(server.url for server in servers)
    defaults: dict[str, Any] = {"request_timeout_seconds": 5.0, "retry_seconds": 0.0}
    return TeacherConfig("big", url=urls if len(urls) > 1 else urls[0], **{**defaults, **fields})


def each(change: Callable[[int, float], tuple[int, float]]) -> Callable[[Positions], Positions]:
    return lambda positions: [
        position and dict(change(token_id, logprob) for token_id, logprob in position.items()) for position in positions
    ]
