"""Serves chat completions of the student to agents and harnesses that are written for OpenAI's interface.

Every episode has a key of its own, which admits to that episode alone and only while it lasts: requests with it are the
episode's turns, one after the other. The server listens at the node's address.
"""

import asyncio
import json
from secrets import token_urlsafe
from typing import Any

from aiohttp import web

from rollout_workers.harness.chat import chunks, fault

KEY_BYTES = 32
MAX_BODY_BYTES = 1 << 26


class Call:
    """Waits for the answer to one request of a client."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self._answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    @property
    def is_given_up(self) -> bool:
        """Return whether the client has gone."""
        return self._answer.cancelled()

    def answer(self, made: dict[str, Any]) -> None:
        if not self._answer.done():
            self._answer.set_result(made)

    def refuse(self, reason: str) -> None:
        """Answer with status 400, after which clients do not try again."""
        self.answer({"error": {"message": reason, "type": "invalid_request_error", "code": "episode_over"}})

    async def answered(self) -> dict[str, Any]:
        return await self._answer


Calls = asyncio.Queue[Call]


class Endpoint:
    """Gives requests to the episodes of one rollout worker; runs in the worker's event loop."""

    def __init__(self, host: str, model: str = "student") -> None:
        """Take the address to listen at, and the name that the model has in lists of models."""
        self._host, self._model = host, model
        self._episodes: dict[str, Calls] = {}
        self._runner: web.AppRunner | None = None
        self._lock = asyncio.Lock()
        self.base_url = ""  # from `start`

    async def start(self) -> None:
        """Listen at a free port, unless that is done."""
        async with self._lock:
            if self._runner is not None:
                return
            app = web.Application(client_max_size=MAX_BODY_BYTES)
            app.add_routes([web.post("/v1/chat/completions", self._complete), web.get("/v1/models", self._models)])
            # A request whose client has gone is not answered, so that nothing is sampled for it.
            self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
            await self._runner.setup()
            site = web.TCPSite(self._runner, self._host, 0)
            await site.start()
            host = f"[{self._host}]" if ":" in self._host else self._host
            self.base_url = f"http://{host}:{self._runner.addresses[0][1]}/v1"

    def open(self) -> tuple[str, Calls]:
        """Return the key of a new episode, and where its requests come."""
        key, calls = token_urlsafe(KEY_BYTES), Calls()
        self._episodes[key] = calls
        return key, calls

    def close(self, key: str) -> None:
        """End an episode: its key admits to nothing any more, and what waits is refused."""
        calls = self._episodes.pop(key, None)
        while calls is not None and not calls.empty():
            calls.get_nowait().refuse("the episode is over")

    async def shutdown(self) -> None:
        for key in list(self._episodes):
            self.close(key)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _calls_of(self, request: web.Request) -> Calls | None:
        return self._episodes.get(request.headers.get("Authorization", "").removeprefix("Bearer "))

    async def _models(self, request: web.Request) -> web.Response:
        if self._calls_of(request) is None:
            return _error("unknown key", status=401)
        return web.json_response({"object": "list", "data": [{"id": self._model, "object": "model", "created": 0}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        calls = self._calls_of(request)
        if calls is None:
            return _error("the key is of no episode that is under way", status=401)
        try:
            body = await request.json()
        except ValueError:
            return _error("the body is not JSON")
        if (reason := fault(body)) is not None:
            return _error(reason)
        call = Call(body)
        calls.put_nowait(call)
        made = await call.answered()
        if "error" in made:
            return web.json_response(made, status=400)
        return await _stream(request, made) if body.get("stream") else web.json_response(made)


def _error(reason: str, status: int = 400) -> web.Response:
    return web.json_response({"error": {"message": reason, "type": "invalid_request_error"}}, status=status)


async def _stream(request: web.Request, made: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    for event in [*map(json.dumps, chunks(made)), "[DONE]"]:
        await response.write(f"data: {event}\n\n".encode())
    await response.write_eof()
    return response
