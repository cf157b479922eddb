import importlib
from types import SimpleNamespace
from typing import Any, get_args

import verifiers.v1 as vf
from verifiers.v1.configs.agent import agent_config_fields


def exported(name: str, base: type) -> Any:
    module = importlib.import_module(name)
    return next(one for one in map(module.__dict__.get, module.__all__) if issubclass(one, base))


def config_of(kind: Any) -> Any:
    return get_args(kind.__orig_bases__[0])[-1]


def default_harness_id(name: str) -> str:
    return "bash"


def env_config_type(name: str, env_id: str) -> Any:
    return config_of(exported(name, vf.Env))


def resolve_env_config(data: dict[str, Any]) -> Any:
    known = {"id", "taskset", *agent_config_fields(env_config_type(data["taskset"]["id"], "")())}
    if unknown := data.keys() - known:
        raise ValueError(f"extra inputs are not permitted: {sorted(unknown)}")
    return SimpleNamespace(**data)


def load_environment(config: Any) -> Any:
    name = config.taskset["id"]
    kind, taskset = exported(name, vf.Env), exported(name, vf.Taskset)
    roles = agent_config_fields(config_of(kind)())
    harnesses = {
        role: exported(getattr(config, role)["harness"]["id"], vf.Harness)(vf.HarnessConfig()) for role in roles
    }
    return kind(config, taskset(config_of(taskset)(**config.taskset)), harnesses)
