"""The one exception that stands for a user's mistake."""


class InputError(ValueError):
    """A user's mistake: one line that names the file or setting, the place and the remedy.

    The command line prints the message alone and exits with code 2; any other exception is ours and keeps its
    traceback.
    """
