"""Has tasks, tasksets, agents and environments that run in this process."""

import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import Any, Generic, TypeVar


class Model:
    """Takes the values of the annotated fields of its class, as pydantic's models do."""

    def __init__(self, **values: Any) -> None:
        known = {name for one in type(self).__mro__ for name in getattr(one, "__annotations__", {})}
        if unknown := values.keys() - known:
            raise ValueError(f"extra inputs are not permitted: {sorted(unknown)}")
        self.__dict__.update(values)


class TaskData(Model):
    prompt: Any = None
    system_prompt: str | None = None
    name: str | None = None
    description: str | None = None


class TasksetConfig(Model):
    id: str = ""
    task: Any = None


class HarnessConfig(Model):
    id: str = "bash"


class AgentConfig(Model):
    harness: HarnessConfig | None = None
    runtime: Any = None


class EnvConfig(Model):
    id: str = ""
    taskset: Any = None


Data, Config = TypeVar("Data"), TypeVar("Config")


class Task(Generic[Data]):
    def __init__(self, data: Any) -> None:
        self.data = data


TaskKind = TypeVar("TaskKind")


class Taskset(Generic[TaskKind, Config]):
    bounded = True

    def __init__(self, config: Any) -> None:
        self.config = config

    def load(self) -> Iterable[Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        return iter(self.load())

    def take(self, count: int) -> Iterator[Any]:
        return islice(self, count)


def reward(weight: float) -> Callable[[Any], Any]:
    def mark(function: Any) -> Any:
        function.weight = weight
        return function

    return mark


@dataclass
class Trace:
    nodes: list[Any] = field(default_factory=list)
    reward: float = 0.0
    errors: list[Any] = field(default_factory=list)
    agent: Any = field(default_factory=lambda: SimpleNamespace(trainable=True))
    stop_condition: str | None = None


class Harness(Generic[Config]):
    def __init__(self, config: Any) -> None:
        self.config = config

    def resolve_prompt(self, data: Any) -> tuple[str | None, Any]:
        return data.system_prompt, data.prompt


class Interaction:
    """Runs the harness for each message of the environment, on the conversation so far."""

    def __init__(self, harness: Any, context: Any, data: Any) -> None:
        self._harness, self._context, self._data = harness, context, data
        self._messages: list[dict[str, Any]] = [] if data.prompt is None else [{"role": "user", "content": data.prompt}]
        self.trace = Trace()

    async def turn(self, message: str | None = None) -> Any:
        import json
        import os

        if message is not None:
            self._messages.append({"role": "user", "content": message})
        data = SimpleNamespace(system_prompt=self._data.system_prompt, prompt=list(self._messages))
        client = self._context.client
        secret = os.environ[client.api_key_var]
        result = await self._harness.launch(self._context, self.trace, None, client.base_url, secret, {}, data)
        if result.exit_code:
            raise RuntimeError(result.stderr)
        answer = json.loads(result.stdout)["choices"][0]["message"]
        self._messages.append(answer)
        self.trace.nodes.append(SimpleNamespace(sampled=True, message=SimpleNamespace(**answer)))
        return SimpleNamespace(terminated=False, last_reply=answer["content"])


class Agent:
    def __init__(self, harness: Any, context: Any, traces: list[Trace]) -> None:
        self._harness, self._context, self._traces = harness, context, traces

    @asynccontextmanager
    async def interaction(self, task: Any) -> AsyncIterator[Interaction]:
        interaction = Interaction(self._harness, self._context, task.data)
        yield interaction
        self._traces.append(interaction.trace)
        for _, function in inspect.getmembers(task, inspect.iscoroutinefunction):
            if hasattr(function, "weight"):
                interaction.trace.reward += function.weight * await function(interaction.trace)


class Env(Generic[Config]):
    def __init__(self, config: Any, taskset: Any, harnesses: dict[str, Any]) -> None:
        self.config, self.taskset, self._harnesses = config, taskset, harnesses

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        yield

    def slots(self, task: Any) -> list[Any]:
        return [task]

    async def run_slot(self, task: Any, context: Any) -> Any:
        traces: list[Trace] = []
        agents = SimpleNamespace(**{role: Agent(harness, context, traces) for role, harness in self._harnesses.items()})
        try:
            await self.run(task, agents)
        except Exception as error:  # noqa: BLE001 - as the package does
            failure = SimpleNamespace(type=type(error).__name__, message=str(error))
            return SimpleNamespace(ok=False, errors=[failure], traces=traces)
        return SimpleNamespace(ok=True, errors=[], traces=traces)

    async def run(self, task: Any, agents: Any) -> None:
        raise NotImplementedError


Agents = Any
