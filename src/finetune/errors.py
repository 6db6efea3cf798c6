"""What a user's mistake is called: one message that says what is wrong, where, and what to type."""

import signal


class FinetuneError(Exception):
    """Base of every error that is shown as one message, without a traceback, with exit code 1."""


class ConfigError(FinetuneError):
    """A value, key or choice on the command line or in conf/ that cannot work."""


class DataError(FinetuneError):
    """Images, labels or folders that cannot be trained on."""


class CheckpointError(FinetuneError):
    """A run directory, checkpoint or weights file that cannot be read or does not fit."""


class TrainingError(FinetuneError):
    """A training that cannot go on: out of memory, or its numbers are no longer finite."""


class NotFinite(TrainingError):
    """A loss or gradient that is not finite. step: from 1. loss: its value there."""

    def __init__(self, message: str, step: int, loss: float) -> None:
        super().__init__(message)
        self.step, self.loss = step, loss


class Interrupted(BaseException):
    """A signal asked for a stop. No Exception, or whoever catches those would go on.

    signum: which one. together: whether all ranks leave at the same place.
    """

    def __init__(self, signum: int, together: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.together = signum, together
