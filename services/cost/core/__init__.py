"""The rules of the ledger, pure: what a call may cost, which limits apply, what is decided."""
