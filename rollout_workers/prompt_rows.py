"""Makes prompts of rows: finds the columns, checks their types, and gives conversations the form of chat templates."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from cluster.config.run_config import Config
from cluster.config.sections import PromptsConfig
from cluster.contracts.errors import PromptError
from rollout_workers.environments.verifiers import VERIFIERS, check_answer
from rollout_workers.prompt_row import Messages, PromptRow
from rollout_workers.prompt_sources import Row, guess_columns, value_at

_FIELDS = ("prompt", "answer", "domain", "teacher", "tools", "chat_template_kwargs")
# Where a field is looked for without prompts.columns: under its own name, and as TRL, OpenAI and verl call it.
USUAL_COLUMNS: Mapping[str, Sequence[str]] = {
    **{name: (name,) for name in _FIELDS},
    "prompt": ("prompt", "messages"),
    "answer": ("answer", "reward_model.ground_truth"),
    "domain": ("domain", "data_source"),
}


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class RowReader:
    """Makes prompts of rows as the run file says."""

    def __init__(self, config: Config) -> None:
        self._settings, self._reads_columns = config.prompts, config.reads_columns
        self._verifiers = [kind for kind in config.environment.weights if kind in VERIFIERS]
        named = config.prompts.columns
        self._paths = {name: (named[name],) if name in named else usual for name, usual in USUAL_COLUMNS.items()}

    def read(self, row: Row) -> PromptRow:
        """Return the prompt of a row; raise PromptError for what is wrong with it."""
        fields = self._fields(row)
        if "prompt" not in fields:
            raise PromptError(_no_prompt(row, self._settings))
        try:
            prompt = msgspec.convert(fields, PromptRow)
        except msgspec.ValidationError as error:
            raise PromptError(f"not a prompt object: {error}") from error
        if not isinstance(prompt.prompt, str):
            messages, ends_in_answer = _ending(_checked(prompt.prompt), self._settings)
            return msgspec.structs.replace(prompt, prompt=messages, ends_in_answer=ends_in_answer)
        if not prompt.prompt.strip():
            raise PromptError("`prompt` is empty")
        return prompt

    def further(self, columns: Iterable[str]) -> list[str]:
        """Return the columns that no field is read from."""
        read = {part for paths in self._paths.values() for path in paths for part in (path, path.partition(".")[0])}
        return [name for name in columns if name not in read]

    def _fields(self, row: Row) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, paths in self._paths.items():
            for path in paths:
                if (value := value_at(row, path)) is not None:
                    fields[name] = value
                    break
        if "prompt" in fields and self._settings.template == "chat":  # a raw text may be JSON
            fields["prompt"] = _as_chat(fields["prompt"])
        if "answer" in fields:
            fields["answer"] = self._answer(fields["answer"])
        for name in fields.keys() & {"tools", "chat_template_kwargs"}:
            fields[name] = _from_json(fields[name])
        if self._reads_columns:
            fields["columns"] = _further_columns(row, self._settings)
        return fields

    def _answer(self, value: Any) -> str | None:
        """Return an answer as a text; a whole number that a table keeps as a float beside nulls, 4.0, is 4."""
        if isinstance(value, float) and math.isnan(value):
            return None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise PromptError(
                f"answer is {value!r}; expected a text or a number, or the path of one in prompts.columns"
            )
        answer = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        mark = self._settings.answer_after
        if mark is not None:
            if mark not in answer:
                raise PromptError(f"answer {answer!r} does not contain {mark!r}, which prompts.answer_after names")
            answer = answer.rpartition(mark)[2].strip()
        for kind in self._verifiers:
            check_answer(kind, answer)
        return answer


def _no_prompt(row: Row, settings: PromptsConfig) -> str:
    named = settings.columns.get("prompt")
    present = [named] if named is not None else [name for name in USUAL_COLUMNS["prompt"] if name in row]
    if any(name in row for name in present):
        return f"`{present[0]}` is null"
    columns = ", ".join(row) or "none"
    if named is not None:
        return f"there is no `{named}`, which prompts.columns.prompt names; the columns are {columns}"
    advice = f'set prompts.columns.prompt = "{guess_columns(row).get("prompt", "NAME")}"'
    return f"there is no `prompt`; the columns are {columns}; {advice}"


def _further_columns(row: Row, settings: PromptsConfig) -> dict[str, Any]:
    """Return the further columns that prompts.columns names; if it names none, all but those that we read."""
    named = {name: path for name, path in settings.columns.items() if name not in _FIELDS}
    if named:
        return {name: value_at(row, path) for name, path in named.items()}
    ours = {settings.columns.get(name, name) for name in _FIELDS}
    return {name: value for name, value in row.items() if name not in ours}


def _from_json(value: Any) -> Any:
    """Return what a text holds as JSON, the form in which tables keep objects that differ from row to row."""
    try:
        return msgspec.json.decode(value) if isinstance(value, str) else value
    except msgspec.DecodeError:
        return value  # its type is refused


def _as_chat(prompt: Any) -> Any:
    """Return a conversation that a table keeps as JSON text, or in ShareGPT's form, as messages; all else as it is."""
    if isinstance(prompt, str) and prompt.lstrip().startswith("[{"):
        parsed = _from_json(prompt)
        if isinstance(parsed, list) and all(
            isinstance(part, dict) and part.keys() & {"role", "from"} for part in parsed
        ):
            prompt = parsed
    if not isinstance(prompt, list):
        return prompt
    return [
        {"role": _SHAREGPT_ROLES.get(part["from"], part["from"]), "content": part["value"]}
        if isinstance(part, dict) and part.keys() == {"from", "value"}
        else part
        for part in prompt
    ]


def _checked(messages: Messages) -> Messages:
    """Check what every chat template reads: a template that finds no content leaves it out without a word."""
    if not messages:
        raise PromptError("`prompt` is empty")
    checked = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise PromptError(f"message {number} has role {role!r}; expected a text such as 'user'")
        content = _content(number, message.get("content"))
        if not content and not message.get("tool_calls"):
            raise PromptError(f"message {number} has content {content!r}; expected a text that is not empty")
        checked.append({**message, "content": content} if content is not None else message)
    return checked


def _content(number: int, content: Any) -> str | None:
    """Return a message's text; a list of text parts is one text, as templates that take lists write it."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PromptError(f"message {number} has content {content!r}; expected a text that is not empty")
    texts = [part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | dict)]
    kinds = [part.get("type", "text") for part in content if isinstance(part, dict)]
    odd = next((kind for kind in kinds if kind not in ("text", "input_text")), None)
    if odd is not None or len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise PromptError(f"message {number} has a part of type {odd!r}; a prompt takes parts of type 'text' alone")
    return "".join(str(text) for text in texts)


def _ending(messages: Messages, settings: PromptsConfig) -> tuple[Messages, bool]:
    """Treat a conversation that ends with the assistant's message as `prompts.last_answer` says."""
    if messages[-1]["role"] != "assistant":
        return messages, False
    if settings.last_answer == "error":
        raise PromptError(
            "the conversation ends with the assistant's message, and the student would answer a second time; "
            'set prompts.last_answer = "drop" to leave it out, or "prefill" to let the student continue it'
        )
    if settings.last_answer == "prefill":
        return messages, True
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise PromptError("the conversation holds nothing but the assistant's messages")
    return messages, True
