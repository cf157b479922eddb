"""Compiles the Jinja template of a teacher's context, and says what it reads."""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cluster.contracts.errors import ConfigError, PromptError
from rollout_workers.rendering import TEMPLATE_ERRORS

if TYPE_CHECKING:
    from rollout_workers.prompts import PromptSet

OF_PROMPT = ("prompt", "answer", "domain", "columns")
OF_ATTEMPT = ("own_attempt", "reward", "feedback")  # known when the completion itself is finished
OF_GROUP = ("attempt", "attempts")  # known when the other completions of the prompt are finished too
NAMES = (*OF_PROMPT, *OF_ATTEMPT, *OF_GROUP)


class ContextTemplate:
    """Renders one template, in Jinja's sandbox; a name that it reads and that is not there is an error.

    Example:
        >>> template = ContextTemplate("{{ prompt }} ({{ hint }})")
        >>> sorted(template.columns), template.reads_group
        (['hint'], False)
        >>> template.render({"prompt": "2 + 2?", "hint": "even"})
        '2 + 2? (even)'
    """

    def __init__(self, text: str) -> None:
        """Compile a template; raise ConfigError if it is none."""
        from jinja2 import StrictUndefined, TemplateError, meta, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            parsed = environment.parse(text)
            # What is set in a branch counts as undeclared there.
            own = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}
            self.names = meta.find_undeclared_variables(parsed) - own - environment.globals.keys()
            self._optional = {
                test.node.name
                for test in parsed.find_all(nodes.Test)
                if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
            }
            self._template = environment.from_string(text)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise ConfigError(f"line {line}: {error}" if line else str(error)) from error

    @property
    def columns(self) -> frozenset[str]:
        """Return the names that a column of the prompts must have; one that is tested for may be missing."""
        return frozenset(self.names.difference(NAMES, self._optional))

    @property
    def reads_group(self) -> bool:
        return bool(self.names & {*OF_GROUP})

    @property
    def reads_attempts(self) -> bool:
        """Return whether it reads anything that is not known before the completion is there."""
        return bool(self.names & {*OF_GROUP, *OF_ATTEMPT})

    def render(self, inputs: Mapping[str, Any]) -> str:
        """Return the text; "" where nothing but white space comes out. Raise PromptError for what fails."""
        try:
            text = self._template.render(inputs)
        except TEMPLATE_ERRORS as error:
            raise PromptError(f"the template fails: {error}") from error
        return text if text.strip() else ""


@lru_cache(64)
def compiled(text: str) -> ContextTemplate:
    return ContextTemplate(text)


def check_columns(template: ContextTemplate, prompts: "PromptSet") -> None:
    """Raise ConfigError if a template reads a column that no prompt has."""
    columns = {column for number in range(len(prompts)) for column in prompts.source(number).columns}
    unknown = sorted(template.columns - columns)
    if unknown:
        raise ConfigError(
            f"the template reads `{unknown[0]}`, and no prompt has such a column; there are "
            f"{', '.join(sorted(columns)) or 'none'}, besides {', '.join(NAMES)}"
        )
