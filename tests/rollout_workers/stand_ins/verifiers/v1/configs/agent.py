from typing import Any

from verifiers.v1 import AgentConfig


def agent_config_fields(config: Any) -> dict[str, AgentConfig]:
    values = {name: getattr(type(config), name, None) for name in type(config).__annotations__}
    return {name: value for name, value in values.items() if isinstance(value, AgentConfig)}
