"""The command `flowtilt`, also as `python -m flowtilt`, which torchrun needs."""

import sys

from flowtilt.distributed import signals


def main() -> int:
    """Runs the command that was typed; returns its exit status."""
    signals.install()  # before the imports: they take a second, in which a signal may come
    try:
        from flowtilt import cli
        from flowtilt.cli import output
        from flowtilt.io import threads

        output.make_robust()
        status = output.closed(cli.main(sys.argv[1:]))
        threads.name_those_left()
        return status
    except KeyboardInterrupt:
        signals.write("flowtilt: interrupted\n")
        return 130
    finally:
        signals.current().over()


if __name__ == "__main__":
    sys.exit(main())
