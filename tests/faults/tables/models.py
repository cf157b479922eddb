"""Faults of the pairs, of model files and of exports."""

from tests.faults.fault import Fault

PAIRS, EXPORT = ("tests/cluster/models/test_pairs.py",), ("tests/learner/checkpointing/test_export.py",)
FAULTS = (
    Fault(
        "an EOS that only the teacher stops at is accepted",
        "cluster/models/pairs.py",
        "(teacher not in ours or student not in theirs)",
        "(student not in theirs)",
        PAIRS,
    ),
    Fault(
        "the teacher's stop ids do not end completions",
        "cluster/models/pairs.py",
        "further = frozenset.union(*ends) - frozenset.intersection(*ends)",
        "further = student.stops - frozenset.intersection(*ends)",
        PAIRS,
    ),
    Fault(
        "tokens of one teacher keep their probability beside another",
        "cluster/models/pairs.py",
        "excluded = {token_id for pair in pairs.values() for token_id in pair.excluded_ids}",
        "excluded = {token_id for pair in list(pairs.values())[1:] for token_id in pair.excluded_ids}",
        PAIRS,
    ),
    Fault(
        "an excluded token keeps its share of the normaliser",
        "cluster/models/lm_head.py",
        "            logits.index_fill_(-1, self.excluded_ids, EXCLUDED_LOGIT)\n",
        "            pass\n",
        ("tests/cluster/models/test_token_scores.py",),
    ),
    Fault(
        "a tied head is compared in its first rows alone",
        "cluster/models/lm_head.py",
        "blocks = (slice(start, start + COMPARED_ROWS)",
        "blocks = (slice(start, start + 8)",
        ("tests/malformed/test_models.py",),
    ),
    Fault(
        "a rank's part of a parameter is rounded down",
        "learner/checkpointing/export.py",
        "end = start + -(-size // len(flat))",
        "end = start + size // len(flat)",
        EXPORT,
    ),
    Fault(
        "an export stops at the student's own EOS alone",
        "learner/checkpointing/export.py",
        "        settings.eos_token_id = sorted(further)",
        "        settings.eos_token_id = own",
        EXPORT,
    ),
)
