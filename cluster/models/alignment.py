"""Aligns a student's completion with the tokens that a teacher of another tokenizer reads it in.

The completion's bytes are written in the teacher's tokens. A position is strict where exactly one token of either side
covers the same bytes (Rethinking cross-tokenizer OPD, arXiv 2610.08448); everything else carries no loss. A token's
probability along one way of writing is not that of its text, which has other ways too: a small bias that stays.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cluster.config.stages import TeacherConfig
from cluster.contracts.columns import Ints
from cluster.models.model_files import load_tokenizer
from cluster.models.token_bytes import TokenBytes

ABSENT = -1  # in a token map: the teacher has no such token


@dataclass(frozen=True)
class Alignment:
    """Holds one completion in the teacher's tokens, and where both sides have one token for the same bytes."""

    token_ids: Ints  # [teacher tokens]
    student_positions: Ints  # [strict] places in the student's completion, ascending
    teacher_positions: Ints  # [strict] places in `token_ids`


class TokenMap:
    """Says which of a teacher's tokens each of the student's is: one of the same bytes, or of the same role.

    Special tokens go by role (EOS, BOS, padding), else by name. All ids that end the student's turns are the teacher's
    end.
    """

    def __init__(self, student: TokenBytes, teacher: TokenBytes, stop_ids: Iterable[int] = ()) -> None:
        self._student, self._teacher = student, teacher
        self._partners = _partners(student, teacher, frozenset(stop_ids))
        size = max(student.of_id, default=-1) + 1
        ids = np.full(size, ABSENT, np.int32)
        for text, token_id in student.ids.items():
            ids[token_id] = teacher.ids.get(text, ABSENT)
        for token_id, partner in self._partners.items():
            # One student token for each of the teacher's, or its probability would count twice.
            ids[token_id] = ABSENT if partner in ids else partner
        self.ids: Ints = ids

    @property
    def shared_ids(self) -> NDArray[np.int64]:
        """Return the teacher's tokens that the student has too."""
        return np.flatnonzero(np.bincount(self.ids[self.ids != ABSENT]))

    @property
    def digest(self) -> str:
        """Return a fingerprint of the map."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()[:16]

    def to_teacher(self, token_ids: Ints) -> Ints:
        """Return the teacher's ids of some of the student's, of any shape; ABSENT where there is none."""
        known = (token_ids >= 0) & (token_ids < len(self.ids))
        mapped: Ints = np.where(known, self.ids[np.where(known, token_ids, 0)], ABSENT).astype(np.int32)
        return mapped

    def align(self, completion_ids: Ints) -> Alignment | None:
        """Align a completion; None if the teacher's tokenizer changes its bytes or cannot write them."""
        spelled = self._student.read(completion_ids.tolist())
        if spelled is None:
            return None
        written: list[int] = []
        pairs: list[tuple[int, int]] = []
        first = 0  # of the tokens since the last special one
        for position in range(len(spelled) + 1):
            partner = self._partners.get(int(completion_ids[position])) if position < len(spelled) else None
            if position < len(spelled) and partner is None:
                continue
            texts = spelled[first:position]
            token_ids = self._teacher.write(b"".join(texts))
            if token_ids is None:
                return None
            theirs = [self._teacher.of_id[token_id] for token_id in token_ids]
            pairs += [(first + one, len(written) + other) for one, other in strict_pairs(texts, theirs)]
            written += token_ids
            if partner is not None:
                pairs.append((position, len(written)))
                written.append(partner)
            first = position + 1
        columns = np.array(pairs, np.int32).reshape(-1, 2)
        return Alignment(np.array(written, np.int32), columns[:, 0], columns[:, 1])

    def rewrite(self, token_ids: Ints) -> Ints | None:
        """Return any of the student's tokens in the teacher's; None where `align` has none."""
        aligned = self.align(token_ids)
        return None if aligned is None else aligned.token_ids


def strict_pairs(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int]]:
    """Return the places of tokens that cover the same bytes of one text.

    Example:
        >>> strict_pairs([b"a", b"bc", b"d"], [b"a", b"b", b"c", b"d"])
        [(0, 0), (2, 3)]
    """
    spans = {span: place for place, span in enumerate(_spans(teacher)) if span[0] < span[1]}
    return [(place, spans[span]) for place, span in enumerate(_spans(student)) if span in spans]


def _spans(texts: list[bytes]) -> list[tuple[int, int]]:
    ends = np.cumsum([0, *map(len, texts)]).tolist()
    return list(pairwise(ends))


def _partners(student: TokenBytes, teacher: TokenBytes, stop_ids: frozenset[int]) -> dict[int, int]:
    """Return the teacher's token of each special token of the student that has one, the student's EOS first."""
    partners: dict[int, int] = {}
    if "eos" in teacher.roles:
        ends = [student.roles["eos"]] if "eos" in student.roles else []
        partners |= dict.fromkeys([*ends, *sorted(stop_ids)], teacher.roles["eos"])
    for role, token_id in student.roles.items():
        if role in teacher.roles:
            partners.setdefault(token_id, teacher.roles[role])
    names = {content: token_id for token_id, content in teacher.special.items()}
    for token_id, content in student.special.items():
        if content in names:
            partners.setdefault(token_id, names[content])
    return partners


def load_token_map(teacher: TeacherConfig) -> TokenMap:
    """Read the tokenizers of an aligned teacher and of its student, and compare their tokens."""
    aligned = teacher.alignment
    assert aligned is not None, "the run says what an aligned teacher is aligned with"
    ours = TokenBytes(load_tokenizer(aligned.student, aligned.trust_remote_code), aligned.student)
    theirs = TokenBytes(load_tokenizer(teacher.model, teacher.trust_remote_code), teacher.model)
    return TokenMap(ours, theirs, aligned.stop_ids)
