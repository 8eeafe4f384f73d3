"""The commands from their first moment: until a conversion begins, an interrupt is one line and the end."""

import os
import signal
import sys


def leave(number: int, frame: object) -> None:
    """End the process. Not by an exception, which half-done imports swallow or turn into another."""
    os.write(2, b"error: interrupted; nothing is left half-written\n")
    os._exit(128 + number)


def main() -> int:
    """Run `lsg-convert`; the exit code is that of `cli.main`."""
    catch_interrupts()
    from . import cli

    return cli.main()


def tune() -> int:
    """Run `lsg-tune`; the exit code is as that of `cli.main`."""
    catch_interrupts()
    from . import tune_cli

    return tune_cli.main()


def catch_interrupts() -> None:
    """Until the command has its own way, an interrupt ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as it is in the background
            signal.signal(number, leave)


if __name__ == "__main__":
    sys.exit(main())
