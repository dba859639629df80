"""Executors that share one import of torch: a server that forks them, and the child an agent starts instead.

`python -m tests.distributed.executor_forkserver PATH` imports torch once and listens; the module
tests.distributed.forked_executor hands the sockets it inherits from its agent to the server at PATH.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from expert_worker import executor

NUM_FDS = 2


def main() -> None:
    """Fork an executor for every pair of descriptors that arrives; killed by whoever started it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen(256)
    print("listening", flush=True)
    while True:
        client, _ = server.accept()
        _, fds, _, _ = socket.recv_fds(client, 1, NUM_FDS)
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            executor.serve_channel(*fds)
        for fd in fds:
            os.close(fd)
        client.close()


if __name__ == "__main__":
    main()
