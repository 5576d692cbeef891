"""Every error a user can meet, in one tree. `exit_code` is what the command line ends with."""

from __future__ import annotations

from dataclasses import dataclass


class CompressError(Exception):
    """Something failed while running."""

    exit_code = 1


class UsageError(CompressError):
    """Bad usage: an option, a path, a model or data that cannot be used. Raised before work starts."""

    exit_code = 2


class CheckpointError(UsageError):
    """A checkpoint that is missing, truncated, corrupt, or not the model its configuration describes."""


class UnsupportedModelError(UsageError):
    """A model with weights that no pass can reach."""


class DataError(UsageError):
    """Calibration or evaluation data that is missing, empty or too short."""


class GateError(CompressError):
    """The quality gate of the pipeline was not met."""

    exit_code = 3


class ResourceError(CompressError):
    """Not enough disk or memory."""

    exit_code = 4


class PeerError(CompressError):
    """Another process of the same run has ended, so that this one cannot go on."""


class NonFiniteError(CompressError):
    """NaN or infinity in a weight or an activation."""


class MergeError(CompressError):
    """A merge would make something that no model can have."""


class SolveError(CompressError):
    """A layer's linear algebra failed. The sweep retries with more damping, then falls back; users do not see it."""


class OptionError(ValueError):
    """An impossible option. `option` names the field; the pipeline adds file, line and path."""

    def __init__(self, option: str, message: str):
        super().__init__(f"{option}: {message}")
        self.option, self.message = option, message


@dataclass(frozen=True)
class Problem:
    """One mistake in a pipeline: where it stands, what is wrong, what to do."""

    path: str  # as in passes[1].wanda.sparsity
    message: str
    line: int | None = None


class ConfigError(UsageError):
    """All mistakes of a pipeline at once."""

    def __init__(self, problems: list[Problem], file: str = "pipeline"):
        self.problems = problems
        lines = []
        for p in problems:
            where = f"{file}:{p.line}" if p.line else file
            said = f"{where}: {p.path}: {p.message}" if p.path else f"{where}: {p.message}"
            lines.append(" ".join(said.splitlines()))
        super().__init__("\n".join(lines))
