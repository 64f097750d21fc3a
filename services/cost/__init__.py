"""The cost room: the ledger, which holds the worst-case price of a call before it is made.

Purpose   admits a call only if it fits every hard limit that applies, and settles its true price.
RPCs      CostService (authorize, settle, release, extend, in batches too), LimitService,
          PriceService, UsageService.
State     PostgreSQL, schema `cost`: accounts, holds, counters, entries, rollups, limits, prices.
Peers     none; the router asks it, operators manage it.
Read on   `core/` (what is decided: `ledger.py` first), `store/ledger.py` (one transaction a batch),
          `store/catalog.py` (limits and prices), `prices.json` (the rate card), `service/` (the
          wire), `main.py` (the wiring).
"""
