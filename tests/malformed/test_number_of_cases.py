"""The tables together are large enough to speak of bad input of every kind."""

from tests.malformed.model_cases import MODELS
from tests.malformed.prompt_cases import PROMPTS
from tests.malformed.run_file_cases import OVERRIDES, RESUMED, RUN_FILES
from tests.malformed.wire_cases import CUTS, WRONG_BATCHES, WRONG_BYTES


def test_there_are_200_distinct_cases() -> None:
    inputs = {
        "run file": {content for content, _ in RUN_FILES.values()},
        "override": {override for override, _ in OVERRIDES.values()},
        "resumed": {content for content, _ in RESUMED.values()},
        "prompts": {(case.content, case.overrides, case.template) for case in PROMPTS.values()},
        "batch": set(WRONG_BATCHES),
        "bytes": {content for content, _ in WRONG_BYTES.values()},
        "cut": set(CUTS),
        "model": set(MODELS),
    }
    counts = {kind: len(found) for kind, found in inputs.items()}
    assert counts["run file"] + counts["override"] + counts["resumed"] == len(RUN_FILES) + len(OVERRIDES) + len(RESUMED)
    assert counts["prompts"] == len(PROMPTS)
    assert sum(counts.values()) >= 200
    assert min(counts["prompts"], counts["model"], counts["batch"] + counts["cut"], counts["override"]) >= 50
