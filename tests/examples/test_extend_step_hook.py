"""The example of a step hook, where it cannot be imported; `test_extend_in_a_run.py` runs it."""

from pathlib import Path

from tests.end_to_end.runs import preceptor


def test_a_hook_that_cannot_be_imported_ends_the_command_before_anything_starts(tmp_path: Path) -> None:
    finished = preceptor("demo", f"run.directory={tmp_path}", 'run.hooks=["examples.extend.step_hook:Absent"]')
    assert finished.code == 1
    assert "'examples.extend.step_hook:Absent' as a step hook cannot be imported" in finished.error
    assert not list(tmp_path.iterdir())
