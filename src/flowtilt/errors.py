"""The one exception that users are meant to see."""


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do.

    The command line prints it after `flowtilt: ` and exits with status 2; `--debug` shows the traceback.
    """
