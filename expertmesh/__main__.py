"""The console script `expertmesh`."""

from __future__ import annotations

import logging
import os
import sys

from common.errors import ExpertMeshError


def main() -> None:
    """Run the command line; exit with its status."""
    # gRPC reads this when it is imported, and would report every closed connection on stderr.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from expertmesh.cli.app import app
    from expertmesh.cli.terminal import fail

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="expertmesh: %(message)s")
    try:
        app()
    except ExpertMeshError as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
