"""The two exceptions that a user sees without a traceback: their own mistake, and a run that cannot continue."""

from __future__ import annotations


class _InLines(Exception):
    """A message of one line; details: where there is more to say, a line for each thing."""

    def __init__(self, problem: object, *details: str) -> None:
        super().__init__(str(problem), *details)

    @property
    def lines(self) -> list[str]:
        """The lines to print: the problem, then the details, indented."""
        details = [f"  {line}" for detail in self.args[1:] for line in str(detail).replace("\n", "\n  ").splitlines()]
        return [" ".join(str(self.args[0]).split()), *details]

    def __str__(self) -> str:
        return "\n".join([str(self.args[0]), *self.lines[1:]])


class InputError(_InLines, ValueError):
    """A user's mistake, in one line: the file or setting, the problem and the remedy.

    details: one for each of several problems, with a separate line for a command that fixes it; `problem` is then
    their heading.
    The command line prints just these lines and exits with code 2.  Any other exception is our bug and keeps its
    traceback.
    """


class TrainingFailed(_InLines, RuntimeError):
    """The run cannot continue; the message is a line and details for the user, and the exit code 1."""
