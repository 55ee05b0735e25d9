"""`ft`, and `python -m finetune`."""

import signal
import sys


def main() -> None:
    """Run `ft`. Ctrl-C is answered as ever while its libraries are read, and while it leaves."""
    try:
        from finetune.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
