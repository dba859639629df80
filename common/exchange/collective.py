"""The exchange over one group per router and epoch, [router | its workers]: made for NCCL and HCCL."""

from __future__ import annotations

from common.exchange.collective_expert import CollectiveExpertExchange
from common.exchange.collective_group import CollectiveGroup, join_group
from common.exchange.collective_router import CollectiveRouterExchange

__all__ = ["CollectiveExpertExchange", "CollectiveGroup", "CollectiveRouterExchange", "join_group"]
