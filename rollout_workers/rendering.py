"""Renders a row of the prompts as the text that a model reads."""

from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from cluster.contracts.errors import PromptError
from rollout_workers.prompt_row import PromptRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cluster.config.sections import PromptsConfig

# A chat template is a program of the model's author, and what it does to messages can fail in as many ways.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def messages_of(prompt: PromptRow) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt.prompt}] if isinstance(prompt.prompt, str) else prompt.prompt


def has_own_system(prompt: PromptRow) -> bool:
    """Return whether a conversation brings its own system message."""
    return any(message["role"] in ("system", "developer") for message in messages_of(prompt))


def render(
    prompt: PromptRow, tokenizer: "PreTrainedTokenizerBase", settings: "PromptsConfig", now: datetime, whose: str
) -> str:
    """Return the text that a model reads; a chat template writes its own special tokens.

    `now` is what chat templates take for the time, and `whose` names the tokenizer's owner in errors.

    Raises:
        PromptError: the row does not go with `settings.template`, or the chat template refuses it.
    """
    if settings.template == "raw":
        if not isinstance(prompt.prompt, str):
            raise PromptError("`prompt` is a conversation, but prompts.template = 'raw' takes a text")
        if prompt.tools or prompt.chat_template_kwargs:
            raise PromptError("the row has tools or chat_template_kwargs, but prompts.template = 'raw' reads none")
        return prompt.prompt
    messages = messages_of(prompt)
    if settings.system_prompt is not None and not has_own_system(prompt):
        messages = [{"role": "system", "content": settings.system_prompt}, *messages]
    continues = prompt.ends_in_answer and settings.last_answer == "prefill"
    kwargs = {"strftime_now": now.strftime, **settings.chat_template_kwargs, **(prompt.chat_template_kwargs or {})}
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=prompt.tools or None,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=False,
                **kwargs,
            )
        )
    except TEMPLATE_ERRORS as error:
        raise PromptError(f"the chat template of {whose} refuses the prompt: {error}") from error
