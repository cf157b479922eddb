"""Notes how every step went, as a step hook of your own: a line per step in `steps.txt`, and one more metric.

In the run file:

    [run]
    hooks = ["examples.extend.step_hook:StepNotes"]
"""

from collections.abc import Sequence

from cluster.contracts.batches import BatchHandle
from cluster.contracts.files import Record
from cluster.run.hooks import RunContext, StepHook


class StepNotes(StepHook):
    """Writes a line per step."""

    def __init__(self, run: RunContext) -> None:
        """Keep the lines of the steps that a resumed run keeps."""
        super().__init__(run)
        self._path = run.directory.path / "steps.txt"
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        self._path.write_text("".join(lines[: run.first_step]))

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        """Note the step's KL; return the tokens of its longest completion, which metrics.jsonl then has too."""
        longest = max(length for handle in batches for length in handle.num_completion_tokens)
        with self._path.open("a") as file:
            file.write(f"step {step}: KL {metrics['train/kl']:.4f}, longest completion {longest} tokens\n")
        return {"notes/longest_completion": float(longest)}

    def end(self, error: BaseException | None) -> None:
        """Say in the terminal where the lines are."""
        self.run.view.say(f"notes: {self._path}")
