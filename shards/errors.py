"""Faults a person can act on.

A command prints these as one line without a traceback and exits with status 1. The message says what failed, where,
what was found, what was expected and what to do next. Anything else that escapes is our own bug and keeps its traceback.
"""


class PipelineError(Exception):
    """Base of every fault that is explained to the person who typed the command."""


class ConfigError(PipelineError):
    """The configuration cannot be used; the message lists every problem found, not only the first."""


class CannotHoldOut(ConfigError):
    """No speaker can be held out of the data that are trained on."""

    def __init__(self, fraction: float, why: str) -> None:
        super().__init__(
            f"train.validation_fraction = {fraction}: {why}; name another data set in train.validation_data or set it to 0"
        )
        self.why = why


class DataError(PipelineError):
    """The input list or an audio file cannot be used."""


class ShardError(PipelineError):
    """A shard, index or data set is damaged, incomplete or does not fit the model."""


class CheckpointError(PipelineError):
    """A checkpoint, adapter or model folder is damaged, incomplete or of another kind."""
