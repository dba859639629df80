"""What an agent starts as its executor in tests of large groups; torch-free, see executor_forkserver.py."""

from __future__ import annotations

import argparse
import os
import socket

PATH_VARIABLE = "FORKSERVER_PATH"


def main() -> None:
    """Hand the descriptors on, and stay until the executor has ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--progress-fd", type=int, required=True)
    arguments = parser.parse_args()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[PATH_VARIABLE])
        socket.send_fds(server, [b"x"], [arguments.channel_fd, arguments.progress_fd])
        os.close(arguments.channel_fd)
        server.recv(1)  # the executor inherits the connection and closes it when it ends


if __name__ == "__main__":
    main()
