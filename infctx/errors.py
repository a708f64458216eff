"""The exceptions that are shown in one line: a user's mistake, and a run that cannot go on."""


class InputError(ValueError):
    """A user's mistake: one line that names the file or setting, the place and the remedy.

    The command line prints the message alone and exits with code 2; any other exception is ours and keeps its
    traceback.
    """


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message is one line for the user, and the exit code 1."""
