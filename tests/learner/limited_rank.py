"""A learner rank whose disk is full; a module of its own, so that Ray can import it."""

import resource

from learner.worker import LearnerActor


class LimitedRank(LearnerActor):
    """A LearnerActor whose files the kernel keeps below a size, so that its own writes fail as on a full disk."""

    def limit_file_bytes(self, num_bytes: int | None) -> None:
        limit = resource.RLIM_INFINITY if num_bytes is None else num_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
