"""Standard output and error that end no command.

A terminal may know fewer characters than a caption has. The reader of a pipe may leave (`flowtilt keys | head`), and a terminal may
hang up while a run goes on: what is written then goes nowhere.

Standard output holds a command's results and nothing else. `usercode.contained` sees to what Python code of the user's prints; C
libraries and child processes write to file descriptor 1, which becomes standard error.
"""

import errno
import io
import os
import sys

from flowtilt.distributed import signals

LEFT = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""What the system says where nobody reads any more."""


class _Kept(io.FileIO):
    """A file that takes whatever is written, once its reader has left or it can't be written to."""

    failed: OSError | None = None
    """Why nothing more is written; none while all is well, and where nobody reads."""

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # pyright: ignore[reportArgumentType, reportReturnType]
        except OSError as error:
            if error.errno not in LEFT:
                self.failed = error
            _to_nowhere(self.fileno())
            return super().write(data)  # pyright: ignore[reportArgumentType, reportReturnType]


def make_robust() -> None:
    """Replaces `sys.stdout` and `sys.stderr`: characters that they can't show are escaped, and a reader may leave."""
    for number, name in ((2, "stderr"), (1, "stdout")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (`>&-`): a file that a run opens must not become it
            _to_nowhere(number)
        elif not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
            continue
        else:
            stream.flush()
        if number == 1 and stream is not None:
            number = os.dup(1)
            os.dup2(2, 1)
        raw = io.BufferedWriter(_Kept(number, "w", closefd=False))
        encoding = stream.encoding if stream else "utf-8"
        at_once = name == "stderr" or raw.isatty()
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=at_once))


def closed(status: int) -> int:
    """Writes what is left in the buffers; returns the command's exit status, or 2 where its output is lost."""
    try:
        sys.stdout.flush()
        failed = getattr(sys.stdout.buffer, "raw", None)
        failed = failed.failed if isinstance(failed, _Kept) else None
    except OSError as error:
        _to_nowhere(sys.stdout.fileno())
        failed = error
    if failed:
        signals.write(f"flowtilt: can't write to standard output: {failed.strerror}\n")
        return status or 2
    return status


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
    os.set_inheritable(number, True)  # child processes write there, too
