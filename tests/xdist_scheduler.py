"""How `pytest -n` spreads tests over processes."""

from xdist.scheduler import LoadFileScheduling

# They look at one and the same run, which takes a minute; a process that has it does all of them.
OF_THE_SHORT_RUN = ("end_to_end/test_training.py", "end_to_end/test_what_is_seen.py", "end_to_end/test_endings.py")


class ByFile(LoadFileScheduling):
    """Keeps the tests of a file in one process, for its fixtures, and so those of files that share one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "the short run" if file.endswith(OF_THE_SHORT_RUN) else str(file)
