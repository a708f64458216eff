"""The exceptions that the user sees without a traceback: a mistake of theirs, and a run that cannot continue."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake: one line that names the file or setting, the place and the remedy.

    details: where there are several problems, each of them, with a line of its own for a command that mends it;
    `problem` then says what they are.
    The command line prints these lines alone and exits with code 2.  Any other exception is ours and keeps its
    traceback.
    """

    def __init__(self, problem: object, *details: str) -> None:
        super().__init__(str(problem), *details)

    @property
    def lines(self) -> list[str]:
        """As they are printed: the problem, then the details, indented."""
        details = [f"  {line}" for detail in self.args[1:] for line in str(detail).replace("\n", "\n  ").splitlines()]
        return [" ".join(str(self.args[0]).split()), *details]

    def __str__(self) -> str:
        return "\n".join([str(self.args[0]), *self.lines[1:]])


class TrainingFailed(RuntimeError):
    """The run cannot continue; the message is one line for the user, and the exit code 1."""
