"""Starts two idle services, prints their process ids, and waits to be killed."""

from __future__ import annotations

import asyncio

from expertmesh.processes import Processes


async def main() -> None:
    async with Processes(lambda _name, _line: None) as processes:
        services = [
            await processes.start("one", "tests.expertmesh.idle_service"),
            await processes.start("two", "tests.expertmesh.idle_service", "stubborn"),
        ]
        for service in services:
            await service.read_line()
        print(*(service.pid for service in services), flush=True)
        await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main())
