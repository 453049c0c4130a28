"""`edgeq` and `python -m edgeq`."""

import os
import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it with exit code 130 from the first moment on."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        # While modules are imported there is nothing to tidy up, and no one to catch an exception.
        signal.signal(signal.SIGINT, _leave)
    from edgeq import cli

    try:
        signal.signal(signal.SIGINT, before)
        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(number: int, frame: object) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    main()
