"""Renders and tokenises the prompts of a run, and says all that is wrong with them in one sentence."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cluster.config.run_config import Config
from cluster.contracts.errors import PromptError
from rollout_workers.environments.tool_calls import tool_schemas
from rollout_workers.prompt_row import PromptRow
from rollout_workers.prompt_rows import RowReader
from rollout_workers.prompt_sources import TRAIN_SPLITS, Row, read_rows, value_at
from rollout_workers.prompts import PromptSet
from rollout_workers.rendering import has_own_system, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_PROBLEMS = 3  # that the sentence shows
Say = Callable[[str], None]


def load_prompts(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    context_tokens: int,
    splits: Sequence[str] = TRAIN_SPLITS,
    say: Say = lambda line: None,
    now: datetime | None = None,
    teacher_tokenizers: Mapping[str, "PreTrainedTokenizerBase"] | None = None,
) -> PromptSet:
    """Read prompts and tokenise them, in the order of the source.

    Args:
        source: as `parse_source` reads it.
        context_tokens: the shortest context among all engines of the run.
        splits: of a data set that has several, in order of preference.
        say: receives one line on what the settings did to the prompts.
        now: what templates take for the time; a resumed run's is when it began, so that its prompts are the same.
        teacher_tokenizers: of teachers that read their prompts in tokens of their own, by name.

    Raises:
        PromptError: the source is missing or empty, or rows are malformed or do not fit; counts them and names some.
    """
    settings = config.prompts
    if settings.template == "chat" and tokenizer.chat_template is None:
        raise PromptError(f"{source}: the student's tokenizer has no chat template; set prompts.template = 'raw'")
    loading = _Loading(str(source), tokenizer, config, now or datetime.now(), teacher_tokenizers or {})
    for where, row in read_rows(str(source), splits, config.environment):
        loading.add(where, row)
    prompts = loading.tokenise(context_tokens)
    if lines := loading.describe():
        say(f"{source}: {len(prompts)} prompts; {'; '.join(lines)}")
    return prompts


class _Loading:
    """Collects the prompts of one source, and what is wrong with its rows."""

    def __init__(
        self,
        source: str,
        tokenizer: "PreTrainedTokenizerBase",
        config: Config,
        now: datetime,
        teacher_tokenizers: Mapping[str, "PreTrainedTokenizerBase"],
    ) -> None:
        self._source, self._tokenizer, self._config = source, tokenizer, config
        self._teacher_tokenizers = teacher_tokenizers
        self._reader = RowReader(config)
        self._now = now
        self._tools = tool_schemas(config.environment.tools)  # of rows that name none
        self._absent_columns = list(config.prompts.columns.values())  # of those that are named, in no row so far
        self._num_rows = 0
        self._columns: dict[str, None] = {}  # names of all columns, in order
        self._prompts: list[tuple[str, PromptRow, str]] = []  # where each stands, and the text that the student reads
        self._problems: list[tuple[str, PromptError]] = []
        self._num_too_long = self._num_own_system = 0
        self._other_teachers: set[str | None] = set()  # that rows name, and the run does not have

    def add(self, where: str, row: Row | PromptError) -> None:
        self._num_rows += 1
        try:
            if isinstance(row, PromptError):
                raise row
            self._columns.update(dict.fromkeys(row))
            if self._absent_columns:
                self._absent_columns = [path for path in self._absent_columns if value_at(row, path) is None]
            prompt = self._reader.read(row)
            if self._tools and prompt.tools is None:
                prompt = msgspec.structs.replace(prompt, tools=self._tools)
            self._prompts.append((where, prompt, self._render(prompt)))
        except PromptError as error:
            self._problems.append((where, error))

    def tokenise(self, context_tokens: int) -> PromptSet:
        """Return the prompts; raise PromptError if any row cannot be used."""
        config, routes = self._config, self._config.routes
        texts = [text for _, _, text in self._prompts]
        # One call for all of them: called once per prompt, a tokenizer spends its time in Python.
        token_ids = (
            self._tokenizer(texts, add_special_tokens=config.prompts.template == "raw")["input_ids"] if texts else []
        )
        self._pass_over_other_teachers()
        kept: list[tuple[Sequence[int], PromptRow, str]] = []
        for (where, prompt, _), ids in zip(self._prompts, token_ids, strict=True):
            try:
                if _fits(len(ids), config, context_tokens):
                    kept.append((ids, prompt, _route(prompt.teacher, routes)))
                else:
                    self._num_too_long += 1
            except PromptError as error:
                self._problems.append((where, error))
        of_teachers = self._tokenise_for_teachers([(prompt, teacher) for _, prompt, teacher in kept])
        self._refuse()
        return PromptSet.of_columns(
            {
                "token_ids": [ids for ids, _, _ in kept],
                "text": [prompt.text for _, prompt, _ in kept],
                "answer": [prompt.answer for _, prompt, _ in kept],
                "domain": [prompt.domain or "" for _, prompt, _ in kept],
                "teacher": [teacher for _, _, teacher in kept],
                "columns": [_as_json(prompt.columns) for _, prompt, _ in kept],
                "teacher_token_ids": of_teachers,
                "source": [_source(config, prompt) for _, prompt, _ in kept],
            }
        )

    def _pass_over_other_teachers(self) -> None:
        """Read no `teacher` where the run has one and every row names another, such as the author of its answer."""
        routes, named = self._config.routes, {prompt.teacher for _, prompt, _ in self._prompts}
        if len(routes) == 1 and named and named.isdisjoint({None, *routes}):
            self._other_teachers = named
            self._prompts = [
                (where, msgspec.structs.replace(prompt, teacher=None), text) for where, prompt, text in self._prompts
            ]

    def _tokenise_for_teachers(self, prompts: Sequence[tuple[PromptRow, str]]) -> list[Sequence[int] | None]:
        """Return each prompt as its teacher reads it; None where the teacher reads the student's tokens."""
        read: list[Sequence[int] | None] = [None] * len(prompts)
        settings = self._config.prompts
        for name, tokenizer in self._teacher_tokenizers.items():
            if settings.template == "chat" and tokenizer.chat_template is None:
                raise PromptError(f"teachers.{name}: its tokenizer has no chat template; set prompts.template = 'raw'")
            numbers = [number for number, (_, teacher) in enumerate(prompts) if teacher == name]
            try:
                whose = f"teachers.{name}"
                texts = [render(prompts[number][0], tokenizer, settings, self._now, whose) for number in numbers]
            except PromptError as error:
                self._problems.append((self._source, error))
                continue
            ids = tokenizer(texts, add_special_tokens=settings.template == "raw")["input_ids"] if texts else []
            for number, of_prompt in zip(numbers, ids, strict=True):
                read[number] = of_prompt
        return read

    def describe(self) -> list[str]:
        """Say what the settings did to the prompts."""
        settings, lines = self._config.prompts, []
        if self._num_too_long:
            lines.append(f"{self._num_too_long:,} of {self._num_rows:,} are skipped, because they are too long")
        if self._num_own_system:
            lines.append(
                f"{self._num_own_system:,} keep their own system message in the place of prompts.system_prompt"
            )
        if self._other_teachers:
            names = ", ".join(sorted(map(str, self._other_teachers))[:NAMED_PROBLEMS])
            lines.append(f"the column teacher ({names}) is not read, for the run has one teacher, and none of these")
        num_answers = sum(prompt.ends_in_answer for _, prompt, _ in self._prompts)
        if num_answers:
            done = "is left out" if settings.last_answer == "drop" else "the student continues"
            lines.append(f"{num_answers:,} end with the assistant's message, which {done}")
        if not self._config.reads_columns and (further := self._reader.further(self._columns)):
            lines.append(f"nothing reads the columns {', '.join(further)}")
        words = re.findall(r"\w+", str(self._tokenizer.chat_template))
        unread = [name for name in settings.chat_template_kwargs if name not in words]
        if settings.template == "chat" and "tools" not in words and any(prompt.tools for _, prompt, _ in self._prompts):
            lines.append("warning: the chat template never reads tools, so the student is not told of any")
        if unread:
            lines.append(f"the chat template never reads {', '.join(unread)} of prompts.chat_template_kwargs")
        return lines

    def _render(self, prompt: PromptRow) -> str:
        """Return the text that the student reads."""
        settings = self._config.prompts
        if settings.system_prompt is not None and has_own_system(prompt):
            self._num_own_system += 1
        return render(prompt, self._tokenizer, settings, self._now, "the student")

    def _refuse(self) -> None:
        if self._num_too_long == self._num_rows:
            raise PromptError(f"{self._source}: all of the {self._num_rows:,} prompts are too long for the context")
        if not self._problems and self._absent_columns:
            raise PromptError(f"{self._source}: no row has `{self._absent_columns[0]}`, which prompts.columns names")
        if not self._problems:
            return
        shown = "; ".join(f"{where}: {error}" for where, error in self._problems[:NAMED_PROBLEMS])
        if len(self._problems) > 1:
            count = f"{len(self._problems):,} of {self._num_rows:,} prompts cannot be used"
            shown = f"{self._source}: {count}; {'first' if len(self._problems) > NAMED_PROBLEMS else 'they'}: {shown}"
        raise PromptError(shown) from self._problems[0][1]


def _fits(tokens: int, config: Config, context_tokens: int) -> bool:
    """Return whether a prompt leaves room for a completion; raise PromptError if not, unless such are skipped."""
    if not tokens:
        raise PromptError("the prompt has no tokens; the student needs one to go on from")
    completion, observations = config.rollout.max_completion_tokens, config.environment.max_observation_tokens
    longest = context_tokens - completion - observations - 1  # a scoring engine generates one token
    if tokens <= longest:
        return True
    if config.prompts.too_long == "skip":
        return False
    less = f"rollout.max_completion_tokens = {completion}"
    if observations:
        less += f", environment.max_observation_tokens = {observations}"
    raise PromptError(
        f"the prompt has {tokens} tokens, but a context of {context_tokens} less {less} and 1 leaves "
        f'room for {longest}; prompts.too_long = "skip" leaves such prompts out'
    )


def _route(teacher: str | None, names: Sequence[str]) -> str:
    if teacher is None and len(names) == 1:
        return names[0]
    if teacher is None or teacher not in names:
        raise PromptError(
            f"teacher is {teacher!r}; expected one of {names}, the [teachers.NAME] of the run file; "
            "prompts.columns.teacher names another column"
        )
    return teacher


def _source(config: Config, prompt: PromptRow) -> str | None:
    is_read = config.has_contexts or config.environment.has_turns
    return msgspec.json.encode(prompt).decode() if is_read else None


def _as_json(columns: dict[str, Any]) -> str | None:
    return msgspec.json.encode(columns).decode() if columns else None
