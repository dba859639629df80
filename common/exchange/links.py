"""The exchange over one pair link per (router, expert worker): one message per way, layer and worker."""

from __future__ import annotations

from common.exchange.links_expert import LinksExpertExchange
from common.exchange.links_router import LinksRouterExchange

__all__ = ["LinksExpertExchange", "LinksRouterExchange"]
