"""Compares a teacher with the student: tokens, ends of turns, and what does not matter, before any engine starts.

Token ids travel, so both must read them as the same tokens. A difference that changes what an id or an end of turn
means is refused, unless `teachers.NAME.accept_differences` names it; any other is accepted and said in one line.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from cluster.config.run_config import Config
from cluster.config.stages import AlignmentConfig, StatesConfig, TeacherConfig
from cluster.contracts.errors import ConfigError, ModelError
from cluster.models.alignment import TokenMap
from cluster.models.model_checks import ModelFacts
from cluster.models.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNUSED = ("chat_template", "bos_token", "pad_token", "unk_token")  # of a teacher, which reads token ids alone


@dataclass(frozen=True)
class Pair:
    """Says how a teacher that fits the student differs from it all the same."""

    excluded_ids: tuple[int, ...] = ()  # tokens that only the teacher has
    stop_ids: frozenset[int] = frozenset()  # that end the teacher's turns, and are the same tokens for the student
    own_stop_ids: frozenset[int] = frozenset()  # that end them and are the teacher's alone
    accepted: str = ""  # the differences, for the user; "": none


def compare(
    name: str, section: TeacherConfig, student: ModelFacts, teacher: ModelFacts, stop_ids: Iterable[int] = ()
) -> Pair:
    """Return the differences between teacher and student; raise ModelError for one that is not accepted.

    `stop_ids` end the student's turns besides those that its own files name.
    """
    tokens = _Tokens(student.tokenizer, teacher.tokenizer)
    parts = [
        *_compare_tokens(name, section, tokens),
        *_compare_ends(name, section, tokens, student.stops | set(stop_ids), teacher.stops),
    ]
    unused = [
        kind for kind in UNUSED if getattr(student.tokenizer, kind, None) != getattr(teacher.tokenizer, kind, None)
    ]
    if unused:
        parts.append(f"not used and different: its {', '.join(unused)}")
    ends, own = teacher.stops - tokens.teacher_only.keys(), teacher.stops & tokens.teacher_only.keys()
    accepted = f"teachers.{name}: {'; '.join(parts)}" if parts else ""
    return Pair(tuple(sorted(tokens.teacher_only)), ends, own, accepted)


@dataclass(frozen=True)
class Pairs:
    """Holds what follows from all pairs of a run."""

    stop_token_ids: tuple[int, ...] = ()  # that end the turns of one model, and not of all
    excluded_ids: tuple[int, ...] = ()  # tokens that only teachers have; of all, for targets may mix their logits
    stop_class: tuple[int, ...] = ()  # ids that count as one token, the first for all; empty: each by itself
    stop_classes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of each teacher, in its own ids
    lines: tuple[str, ...] = ()  # for the user
    alignments: Mapping[str, AlignmentConfig] = field(default_factory=dict)  # of teachers with other tokenizers
    states: Mapping[str, StatesConfig] = field(default_factory=dict)  # by teacher: what it sends of its layers

    def apply(self, config: Config) -> Config:
        """Return the run with completions that end where student or teachers do, and without the teachers' own tokens.

        The teachers send the layers' states that the objective compares.

        Example:
            >>> from tests.builders import make_config
            >>> Pairs(stop_token_ids=(7,)).apply(make_config()).rollout.stop_token_ids
            (7,)
        """
        stop_token_ids = _union(config.rollout.stop_token_ids, self.stop_token_ids)
        rollout = replace(config.rollout, stop_token_ids=stop_token_ids)
        if self.stop_class:
            rollout = replace(rollout, stop_class=self.stop_class)
        teachers = {}
        for name, section in config.teachers.items():
            if name in self.alignments:
                section = replace(section, alignment=self.alignments[name])
            else:
                section = replace(excluding(section, self.excluded_ids), states=self.states.get(name))
            teachers[name] = merging(section, self.stop_classes.get(name, ()), config.teachers[name].excluded_token_ids)
        return replace(config, rollout=rollout, teachers=teachers)


def compare_all(config: Config, student: ModelFacts, teachers: Mapping[str, ModelFacts]) -> Pairs:
    """Compare every teacher of a run with the student; raise ModelError for a difference that is not accepted."""
    stop_ids = config.rollout.stop_token_ids
    others = {name: facts for name, facts in teachers.items() if config.teachers[name].is_aligned}
    aligned = {name: align(name, config, student, facts) for name, facts in others.items()}
    teachers = {name: facts for name, facts in teachers.items() if name not in aligned}
    pairs = {name: compare(name, config.teachers[name], student, facts, stop_ids) for name, facts in teachers.items()}
    lines = [line for _, line in aligned.values()]
    lines += [pair.accepted for pair in pairs.values() if pair.accepted]
    lines += [
        f"warning: teachers.{name} is the student's own model, from which it learns nothing"
        for name in config.routes
        if config.teachers[name].source is None and _is_same(config.student.model, config.teachers[name].model)
    ]
    lines += [
        f"warning: teachers.{name} is the student of now and reads no context, so it teaches nothing"
        for name in config.routes
        if config.teachers[name].refresh == "live" and config.teachers[name].context is None
    ]
    ends = [student.stops, *(pair.stop_ids for pair in pairs.values())]
    further = frozenset.union(*ends) - frozenset.intersection(*ends)  # each engine knows those of its own model
    excluded = {token_id for pair in pairs.values() for token_id in pair.excluded_ids}
    has_more = any(pair.own_stop_ids for pair in pairs.values())
    all_ends = frozenset.union(*ends, stop_ids)
    stop_class = find_stop_class(config, student, teachers.values(), all_ends, has_more)
    stop_classes = {name: (*stop_class, *sorted(pair.own_stop_ids)) for name, pair in pairs.items() if stop_class}
    if config.rollout.stop_class != ():
        stop_classes |= {name: by_role(facts) for name, facts in others.items() if len(facts.stops) > 1}
    if stop_class:
        vocabulary = {token_id: token for token, token_id in student.tokenizer.get_vocab().items()}
        named = ", ".join(repr(vocabulary.get(token_id, token_id)) for token_id in stop_class)
        lines.append(f"{named} end completions and count as one token, the first (rollout.stop_class)")
    alignments = {name: alignment for name, (alignment, _) in aligned.items()}
    return Pairs(tuple(sorted(further)), tuple(sorted(excluded)), stop_class, stop_classes, tuple(lines), alignments)


def find_stop_class(
    config: Config, student: ModelFacts, teachers: Iterable[ModelFacts], ends: Iterable[int], has_more: bool
) -> tuple[int, ...]:
    """Return the ids that end completions, as one class; none where there is one, or the run file wants none.

    The student's EOS comes first, or the lowest id: it is written for all of them, and every model has it. `has_more`:
    a teacher has further ids of its own.

    Raises:
        ConfigError: ids are to be merged and the rollout engine cannot do so.
    """
    written, eos = config.rollout.stop_class, student.tokenizer.eos_token_id
    shared = min([student.vocabulary, *(teacher.vocabulary for teacher in teachers)])
    by_default = sorted(ends, key=lambda token_id: (token_id != eos, token_id))
    known = [token_id for token_id in (by_default if written is None else written) if token_id < student.vocabulary]
    known.sort(key=lambda token_id: token_id >= shared)
    if not known or known[0] >= shared or len(known) + has_more < 2:
        return ()
    if "speculative_config" in config.rollout.engine.extra:
        raise ConfigError(
            f"rollout.engine.extra.speculative_config: vLLM decodes speculatively without logits processors, which "
            f"make one token of the ids {known} that end a completion; leave it out, or set rollout.stop_class = []"
        )
    return tuple(known)


def by_role(facts: ModelFacts) -> tuple[int, ...]:
    """Return the ids that end a model's turns, its EOS first."""
    return tuple(sorted(facts.stops, key=lambda token_id: (token_id != facts.tokenizer.eos_token_id, token_id)))


def merging(section: TeacherConfig, stop_class: Sequence[int], excluded: Sequence[int]) -> TeacherConfig:
    """Return a teacher's section that counts the class as one token, without the ids that the run file excludes."""
    kept = [token_id for token_id in section.excluded_token_ids if token_id in excluded or token_id not in stop_class]
    return replace(section, stop_class=tuple(stop_class), excluded_token_ids=tuple(kept))


def align(name: str, config: Config, student: ModelFacts, teacher: ModelFacts) -> tuple[AlignmentConfig, str]:
    """Compare the tokens of an aligned teacher with the student's; return what its section gets, and a line.

    Raises:
        ModelError: the bytes of a tokenizer's tokens are not known, or it has no end of a turn.
    """
    section, stop_ids = config.teachers[name], sorted(student.stops | set(config.rollout.stop_token_ids))
    ours, theirs = TokenBytes(student.tokenizer, config.student.model), TokenBytes(teacher.tokenizer, section.model)
    if "eos" not in theirs.roles:
        raise ModelError(f"teachers.{name}: its tokenizer names no EOS, so the student cannot learn where to end")
    token_map = TokenMap(ours, theirs, stop_ids)
    line = (
        f"teachers.{name}: aligned with the student's tokens by their bytes; {len(token_map.shared_ids):,} tokens are "
        f"shared, of {len(ours.of_id):,} and {len(theirs.of_id):,} (map {token_map.digest})"
    )
    return AlignmentConfig(
        config.student.model, config.student.trust_remote_code, tuple(stop_ids), token_map.digest
    ), line


def excluding(section: TeacherConfig, token_ids: Sequence[int]) -> TeacherConfig:
    """Return a teacher's section that excludes these tokens too."""
    return replace(section, excluded_token_ids=_union(section.excluded_token_ids, token_ids))


def _union(some: Iterable[int], others: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({*some, *others}))


class _Tokens:
    """Holds two vocabularies by id, and where they differ."""

    def __init__(self, student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase") -> None:
        self.student, self.teacher = student, teacher
        ours, theirs = student.get_vocab(), teacher.get_vocab()
        self.ours = {token_id: token for token, token_id in ours.items()}
        self.theirs = {token_id: token for token, token_id in theirs.items()}
        renamed = {
            token_id
            for token_id in self.ours.keys() & self.theirs.keys()
            if self.ours[token_id] != self.theirs[token_id]
        }
        moved = {token_id for token, token_id in ours.items() if theirs.get(token, token_id) != token_id}
        self.differing = sorted(renamed | moved)
        self.student_only = {token_id: self.ours[token_id] for token_id in self.ours.keys() - self.theirs.keys()}
        self.teacher_only = {token_id: self.theirs[token_id] for token_id in self.theirs.keys() - self.ours.keys()}
        self._added = {*student.get_added_vocab(), *teacher.get_added_vocab()}

    def are_added(self, token_ids: Iterable[int]) -> bool:
        """Return whether all were added beside the vocabulary, as special tokens are, so that no text has them."""
        both = (tokens[token_id] for token_id in token_ids for tokens in (self.ours, self.theirs) if token_id in tokens)
        return self._added.issuperset(both)

    def describe(self, token_id: int) -> str:
        ours, theirs = self.ours.get(token_id), self.theirs.get(token_id)
        elsewhere = None if ours is None else self.teacher.get_vocab().get(ours)
        if elsewhere is not None:
            return f"token {ours!r} has id {token_id} for the student and {elsewhere} for the teacher"
        return f"id {token_id} is {ours!r} for the student and {theirs!r} for the teacher"


def _compare_tokens(name: str, section: TeacherConfig, tokens: _Tokens) -> Sequence[str]:
    accepts = "tokens" in section.accept_differences
    differing, refusal = tokens.differing, f"teachers.{name}: its tokenizer is not the student's: "
    if differing and not tokens.are_added(differing):
        raise ModelError(
            f"{refusal}{tokens.describe(differing[0])}, and {len(differing)} ids differ in all; a teacher must read "
            "the student's token ids as the same tokens, so choose one that has the student's tokenizer, or align "
            f'the two with teachers.{name}.tokenizer = "aligned" (docs/cross_tokenizer.md)'
        )
    accept = f'if you know that this does no harm, set teachers.{name}.accept_differences = ["tokens"]'
    if differing and not accepts:
        raise ModelError(
            f"{refusal}{tokens.describe(differing[0])}, and {len(differing)} added tokens differ in all; {accept}"
        )
    for only, whose in ((tokens.student_only, "student"), (tokens.teacher_only, "teacher")):
        if only and not accepts and not tokens.are_added(only):
            raise ModelError(
                f"{refusal}only the {whose} has {_count(only)}, not all of them added ones, so the two would write the "
                f"same text in other tokens; {accept}"
            )
    parts = []
    if differing:
        parts.append(f"{len(differing)} added tokens differ ({tokens.describe(differing[0])})")
    if tokens.teacher_only:
        parts.append(f"it gives no probability to {_count(tokens.teacher_only)} that the student lacks")
    if tokens.student_only:
        parts.append(f"it does not know {_count(tokens.student_only)} of the student")
    return parts


def _compare_ends(
    name: str, section: TeacherConfig, tokens: _Tokens, ours: frozenset[int] | set[int], theirs: frozenset[int]
) -> Sequence[str]:
    """Compare where turns end: a student that learns to write an EOS which does not stop it goes on for ever."""
    student, teacher = tokens.student.eos_token_id, tokens.teacher.eos_token_id
    if teacher in tokens.teacher_only:
        raise ModelError(
            f"teachers.{name}: its EOS {tokens.teacher.eos_token!r} is a token that the student lacks, so the student "
            "cannot learn where to end; give the student's tokenizer and embedding that token"
        )
    differs = ours != theirs and (teacher not in ours or student not in theirs)
    if differs and "eos" not in section.accept_differences:
        raise ModelError(
            f"teachers.{name}: its EOS is {tokens.teacher.eos_token!r}, and the student's is "
            f"{tokens.student.eos_token!r}: the student would learn to write what does not end its turn; set "
            f'teachers.{name}.accept_differences = ["eos"], so that completions end at both'
        )
    further = [tokens.theirs.get(token_id, str(token_id)) for token_id in sorted(theirs - ours)]
    return [f"completions end at {', '.join(map(repr, further))} too"] if further else []


def _count(tokens: Mapping[int, str]) -> str:
    """Return how many tokens there are, and the first.

    Example:
        >>> _count({7: "<think>", 8: "</think>"})
        "2 tokens ('<think>', ...)"
    """
    return f"{len(tokens)} token{'s'[: len(tokens) - 1]} ({tokens[min(tokens)]!r}{', ...' if len(tokens) > 1 else ''})"


def _is_same(model: str, other: str) -> bool:
    return model == other or (Path(model).is_dir() and Path(other).is_dir() and Path(model).samefile(other))
