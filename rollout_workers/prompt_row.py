"""Defines one prompt as the rows of files give it."""

from typing import Any

import msgspec

Messages = list[dict[str, Any]]


class PromptRow(msgspec.Struct, frozen=True):
    """Holds one prompt before it is tokenised."""

    prompt: str | Messages
    answer: str | None = None
    domain: str | None = None
    teacher: str | None = None
    tools: Messages | None = None  # JSON schemas
    chat_template_kwargs: dict[str, Any] | None = None
    columns: dict[str, Any] = {}  # further ones, for rewards and environments
    ends_in_answer: bool = False  # the conversation's last message is the assistant's

    @property
    def text(self) -> str:
        """Return the prompt as its file gives it; of a conversation, the last message."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content") or "")
