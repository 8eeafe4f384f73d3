"""The command from its first moment: until a conversion begins, an interrupt is one line and the end."""

import os
import signal
import sys


def leave(number: int, frame: object) -> None:
    """End the process. Not by an exception, which half-done imports swallow or turn into another."""
    os.write(2, b"error: interrupted; nothing is left half-written\n")
    os._exit(128 + number)


def main() -> int:
    """Run the command; the exit code is that of `cli.main`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as it is in the background
            signal.signal(number, leave)
    from . import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
