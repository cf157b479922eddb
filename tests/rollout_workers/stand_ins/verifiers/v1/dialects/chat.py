from typing import Any


def message_to_wire(message: Any) -> Any:
    return message
