"""A service that does nothing: `python -m tests.expertmesh.idle_service [WORDS] --lifeline-fd N`.

It exits when its lifeline ends; with `fail` at once, with a sentence; with `stubborn` it ignores SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    if "fail" in sys.argv:
        print("something was wrong with the input", file=sys.stderr)
        raise SystemExit(2)
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("listening here=1", flush=True)
    print("a line of the log", file=sys.stderr, flush=True)
    os.read(int(sys.argv[sys.argv.index("--lifeline-fd") + 1]), 1)


if __name__ == "__main__":
    main()
