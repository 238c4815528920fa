"""The library's errors: every user mistake raises a `WarmstartError` before anything is written."""

from collections.abc import Iterable

from .redaction import redact


class WarmstartError(ValueError):
    """A request that cannot be met; the message says what was given, why not, and what to pass instead.

    A message may quote what was given, or a server's words: tokens and signatures in it are hidden.
    """

    def __init__(self, message: object = "", *more: object):
        super().__init__(redact(message), *more)


class LayoutError(WarmstartError):
    """A model whose tensors could not all be placed in spaces."""


class SizeError(WarmstartError):
    """Target sizes that a model or an operator does not admit."""


class StateError(WarmstartError):
    """A training state that does not belong to the model, or is incomplete."""


class HubError(WarmstartError):
    """The Hub refused, or could not be reached; the message says what to do."""


class CheckpointError(WarmstartError):
    """A checkpoint that cannot be read or written: damaged, changed meanwhile, in use, or without room on the disk.

    `problems` holds all that was found, one sentence each; the message names the first twenty.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()):
        self.problems = tuple(problems)
        more = len(self.problems) - 20
        lines = [*self.problems[:20], *([f"and {more} more."] if more > 0 else [])]
        super().__init__(" ".join([message, *lines]) if len(lines) == 1 else "\n  - ".join([message, *lines]))


class ExactnessError(WarmstartError):
    """A growth that was planned as exact and measured otherwise."""


class UntraceableError(WarmstartError):
    """A model whose tensors in memory and in its files are not made of each other's pieces; it is grown in memory."""
