"""Rank tables as files, in MindIE's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def write_table(directory: Path, servers: Mapping[str, Mapping[int, int]]) -> Path:
    """Write a table: the address of each server -> device_id -> rank_id."""

    def device_of(server: int, device: int, rank: int) -> dict[str, str]:
        address = f"192.168.{server}.{device}"
        return {"device_id": str(device), "device_ip": address, "rank_id": str(rank)}

    document = {
        "server_count": str(len(servers)),
        "server_list": [
            {
                "server_id": address,
                "container_ip": address,
                "device": [device_of(number, device, rank) for device, rank in ranks.items()],
            }
            for number, (address, ranks) in enumerate(servers.items())
        ],
        "status": "completed",
        "version": "1.0",
    }
    file = directory / "ranktable.json"
    file.write_text(json.dumps(document))
    file.chmod(0o640)
    return file
