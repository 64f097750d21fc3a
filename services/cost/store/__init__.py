"""All SQL of the ledger: `batch.py` (one transaction a batch), `ledger.py` (the actor before it),
`catalog.py` (limits and prices), `accounts.py`, `reports.py` (usage, holds, parity)."""
