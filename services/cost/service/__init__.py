"""The wire of the ledger, one file a service: proto to core, and core to proto."""

from services.cost.service.ledger import CostService
from services.cost.service.limits import LimitService
from services.cost.service.prices import PriceService
from services.cost.service.usage import UsageService

__all__ = ["CostService", "LimitService", "PriceService", "UsageService"]
