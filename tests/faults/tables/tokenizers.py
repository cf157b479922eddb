"""Faults of teachers with another tokenizer: other bytes, other tokens, other places."""

from tests.faults.fault import Fault

ALIGNMENT = ("tests/cluster/models/test_alignment.py",)
BACKEND = ("tests/teacher_workers/backends/test_aligned.py",)
LEARNER = ("tests/learner/batching/test_strict_tokens.py",)

FAULTS = (
    Fault(
        "tokens that begin at the same byte count as one",
        "cluster/models/alignment.py",
        "return list(pairwise(ends))",
        "return [(start, start + 1) for start in ends[:-1]]",
        ALIGNMENT,
    ),
    Fault(
        "spans count characters",
        "cluster/models/alignment.py",
        "np.cumsum([0, *map(len, texts)])",
        'np.cumsum([0, *(len(text.decode(errors="replace")) for text in texts)])',
        ALIGNMENT,
    ),
    Fault(
        "the bytes that were written are not compared",
        "cluster/models/token_bytes.py",
        'if b"".join(spelled[first:]) == expected and (anchor or not first):',
        "if anchor or not first:",
        ALIGNMENT,
    ),
    Fault(
        "a text is written without an anchor alone",
        "cluster/models/token_bytes.py",
        'ANCHORS = ("", "\\n", "a")',
        'ANCHORS = ("",)',
        ALIGNMENT,
    ),
    Fault(
        "a special token's name in a text is the token",
        "cluster/models/token_bytes.py",
        "self._writer.encode_special_tokens = True",
        "self._writer.encode_special_tokens = False",
        ALIGNMENT,
    ),
    Fault(
        "special tokens go by name before their role",
        "cluster/models/alignment.py",
        'partners |= dict.fromkeys([*ends, *sorted(stop_ids)], teacher.roles["eos"])',
        'partners |= dict.fromkeys(ends, teacher.roles["eos"])',
        ALIGNMENT,
    ),
    Fault(
        "a teacher's token stands for several of the student",
        "cluster/models/alignment.py",
        "ids[token_id] = ABSENT if partner in ids else partner",
        "ids[token_id] = partner",
        ALIGNMENT,
    ),
    Fault(
        "the token after a special one is shifted",
        "cluster/models/alignment.py",
        "pairs += [(first + one, len(written) + other)",
        "pairs += [(first + one, other)",
        ALIGNMENT,
    ),
    Fault(
        "absent candidates take part",
        "teacher_workers/translation.py",
        "shared=mapped[placed] != ABSENT,",
        "shared=mapped[placed] == mapped[placed],",
        BACKEND,
    ),
    Fault(
        "scores go to the first places of the rows",
        "teacher_workers/translation.py",
        "strict = offsets[row] + aligned.student_positions",
        "strict = offsets[row] + np.arange(len(aligned.student_positions))",
        BACKEND,
    ),
    Fault(
        "the teacher's rows are taken at the student's places",
        "teacher_workers/translation.py",
        "mask[len(prompt) + aligned.teacher_positions] = 1",
        "mask[len(prompt) + aligned.student_positions] = 1",
        BACKEND,
    ),
    Fault(
        "coverage is never too low",
        "teacher_workers/backends/aligned.py",
        "if self._num_tokens >= MIN_JUDGED_TOKENS and coverage < self._min_coverage:",
        "if self._num_tokens < 0:",
        BACKEND,
    ),
    Fault(
        "metrics count what is not strict",
        "teacher_workers/actor.py",
        "return logprobs[strict], rollout_logprobs[strict]",
        "return logprobs, rollout_logprobs",
        BACKEND,
    ),
    Fault(
        "absent candidates are compared all the same",
        "learner/loss/evaluators.py",
        "return tokens.candidate_ids, tokens.shared",
        "return tokens.candidate_ids, None",
        BACKEND,
    ),
    Fault(
        "a token counts where any model scored it",
        "cluster/contracts/trajectory.py",
        "np.logical_and.reduce(columns)",
        "np.logical_or.reduce(columns)",
        LEARNER,
    ),
    Fault(
        "all completion tokens divide the step",
        "learner/batching/arrivals.py",
        "sum(handle.num_loss_tokens or handle.num_completion_tokens)",
        "sum(handle.num_completion_tokens)",
        LEARNER,
    ),
    Fault(
        "strict tokens are numbered anew",
        "learner/batching/micro_batch.py",
        "else np.flatnonzero(self.strict)",
        "else np.arange(len(self.rollout_logprobs))",
        LEARNER,
    ),
)
