"""Takes prompts and their rewards from the procedural tasks of reasoning-gym, which need no files and no network.

`prompts.train = "reasoning-gym:TASK?size=500&seed=0"` names a task; further parameters are those of its configuration.
" + " joins several tasks. A row keeps its task and number, from which the package makes the same entry again wherever a
completion is rewarded: an entry's metadata may be what no column of prompts holds.

The user installs the package (`pip install reasoning-gym`, https://github.com/open-thought/reasoning-gym).
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from cluster.config.data_source import parse_task
from cluster.contracts.errors import PromptError

TASK, ENTRY = "reasoning_gym_task", "reasoning_gym_entry"  # columns of the prompts
DEFAULTS = {"size": 500, "seed": 0}  # the package's own seed differs from run to run
REMEMBERED_ENTRIES = 1024  # the samples of a prompt are rewarded one after the other


def read_tasks(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each prompt stands, and its row.

    Raises:
        PromptError: the package is missing, or has no such task with such parameters.
    """
    for task in source.split(" + "):
        name, _ = parse_task(task)
        for number in range(len(dataset_of(task))):
            entry = entry_of(task, number)
            row = {"prompt": entry["question"], "answer": entry["answer"], "domain": name, TASK: task, ENTRY: number}
            yield f"reasoning-gym:{task}: entry {number}", row


def score(prompt: str, completion: str, columns: Mapping[str, Any]) -> float:
    """Return what the task's own scorer gives the answer, from 0 to 1; what was cut off at its limit gets 0.

    The answer is what stands between the last `<answer>` and `</answer>`, as in the package's system prompts; without
    them, the whole completion.
    """
    if TASK not in columns:
        raise ValueError("the prompt is none of reasoning-gym's; set prompts.train = 'reasoning-gym:TASK'")
    entry = entry_of(columns[TASK], int(columns[ENTRY]))
    if entry["question"] != prompt:
        raise ValueError(
            f"reasoning-gym:{columns[TASK]} asks something else in entry {columns[ENTRY]} here; install the same "
            "version of the package on every node"
        )
    if columns["finish_reason"] != "stop":
        return 0.0
    from reasoning_gym.utils import extract_answer

    answer = extract_answer(completion)
    return float(dataset_of(columns[TASK]).score_answer(completion.strip() if answer is None else answer, entry))


@lru_cache(maxsize=16)
def dataset_of(task: str) -> Any:
    """Return the package's data set of a task, such as `chain_sum?size=100`; raise PromptError if it has none."""
    name, parameters = parse_task(task)
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise PromptError(
            f"reasoning-gym:{task}: the package cannot be imported ({error}); pip install reasoning-gym"
        ) from error
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, 3) or sorted(DATASETS)
        raise PromptError(f"reasoning-gym has no task '{name}'; there are {', '.join(near)}")
    try:
        return reasoning_gym.create_dataset(name, **{**DEFAULTS, **parameters})
    except Exception as error:
        raise PromptError(f"reasoning-gym:{task}: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=REMEMBERED_ENTRIES)
def entry_of(task: str, number: int) -> Mapping[str, Any]:
    """Return an entry as the package makes it: `question`, `answer` and `metadata`."""
    entry: Mapping[str, Any] = dataset_of(task)[number]
    return entry
