"""Every exception raised on purpose, as one tree.

Each takes one message and nothing else, so Ray can pickle it from an actor to the driver, and each message is one
sentence: where, what was found, what to do.
"""

LONGEST_MESSAGE = 2000  # characters; what a damaged file holds may be quoted in full by the library that reads it


def in_one_line(message: str) -> str:
    """Return the text without line breaks, its middle left out where it is very long.

    Example:
        >>> in_one_line("Validation error:" + chr(10) + "  expected int")
        'Validation error: expected int'
    """
    line = " ".join(part.strip() for part in message.splitlines())
    half = LONGEST_MESSAGE // 2
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} ... {line[-half:]}"


class PreceptorError(Exception):
    """Base of every error that the program raises on purpose.

    File names, field names and other libraries' findings may hold line breaks; the message never does.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(in_one_line(message))


class ConfigError(PreceptorError, ValueError):
    """A run file, an override or a combination of settings is wrong."""


class PromptError(PreceptorError, ValueError):
    """A prompt file is missing, malformed, or holds a prompt that cannot be used."""


class ModelError(PreceptorError, ValueError):
    """A model or tokenizer is missing, unreadable, or does not fit the others of the run."""


class TrajectoryError(PreceptorError, ValueError):
    """A trajectory batch breaks its contract."""


class ActorError(PreceptorError, RuntimeError):
    """An actor died, or did not answer in time."""


class ActorDiedError(ActorError):
    """An actor's process is gone, or its engine's."""

    last_error = ""  # which its processes printed; "": none, as when they are killed


class LearnerDiedError(ActorDiedError):
    """A rank of the learner is gone, and with it the step under way."""


class LostBytesError(PreceptorError, RuntimeError):
    """Bytes in Ray's object store are gone with the node that held them."""


class RolloutError(PreceptorError, RuntimeError):
    """A rollout worker could not produce the trajectories that it was asked for."""


class ScoreError(PreceptorError, ValueError):
    """A teacher returned scores that cannot be training data."""


class NotFiniteError(ScoreError):
    """Scores are NaN or infinite."""


class WrongLengthError(ScoreError):
    """There is not one score for each completion token, so scores would belong to other tokens."""


class UniformError(ScoreError):
    """Scores say nothing about their tokens: all are alike."""


class WeightSyncError(PreceptorError, RuntimeError):
    """Weights were lost, damaged, or arrived out of order on their way to a rollout worker."""


class PlacementError(PreceptorError, RuntimeError):
    """The cluster cannot hold the pools that the run asks for."""


class JobError(PreceptorError, RuntimeError):
    """A cluster's job server cannot be reached, or a job cannot be submitted, followed or stopped."""


class CheckpointError(PreceptorError, RuntimeError):
    """A checkpoint cannot be written, found or restored."""


class TrainingError(PreceptorError, RuntimeError):
    """Training goes wrong, and an alarm that is to stop it went off."""


class RunStopped(PreceptorError):
    """The run ended in order before its last step, because a user or Ray asked for it."""
