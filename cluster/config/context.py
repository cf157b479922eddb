"""Defines what a teacher may read in the place of the student's prompt: `[teachers.NAME.context]`."""

from pathlib import Path

from msgspec.structs import force_setattr

from cluster.config.fields import Finite, Fraction, Items, Positive, Section, Text

MAX_TEMPLATE_BYTES = 1 << 16


class ContextConfig(Section, frozen=True):
    """Sets the prompt that a teacher reads before the student's completion; docs/self_distillation.md has its names.

    A prompt for which the template renders to nothing has no context, and its completions are not learned from.
    """

    template: Text  # Jinja, or a file of it, which is read once, when the run begins
    max_tokens: Items | None = (
        None  # of the teacher's whole prompt: attempts and feedback are cut to fit; None: its room
    )
    min_reward: Finite = 0.5  # of an attempt that counts as successful
    own_attempt: bool = False  # whether a completion may be shown to its teacher as the successful attempt
    wait_seconds: Positive = 600.0  # that a finished completion waits for others of its prompt which the template reads
    compared_rows: Fraction = 0.0  # share of rows scored without the context too, to measure what it says

    def __post_init__(self) -> None:
        force_setattr(self, "template", read_template(self.template))


def read_template(template: str) -> str:
    """Return a template's text, from its file if it names one; raise ValueError if it is neither."""
    if "{" in template:
        return template
    path = Path(template)
    if "\n" in template or not path.is_file():
        raise ValueError(
            f"template {template[:60]!r} is neither a file nor a Jinja template, which has a {{{{ name }}}}"
        )
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise ValueError(f"template {template} has more than {MAX_TEMPLATE_BYTES:,} bytes; it is no template")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template {template} cannot be read: {error}") from error
    if "{" not in text:
        raise ValueError(f"template {path} reads nothing of the prompt; it needs a {{{{ prompt }}}} at least")
    return text
