"""Accounts: scopes under numbers, remembered by the process, since an account never changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

import asyncpg

from chassis.postgres import Connection
from services.cost.core.usage import Account, Scope

_REMEMBERED_MAX = 100_000

_ADD: Final = """
INSERT INTO accounts (tenant, project, service, provider, model, operation, simulated)
SELECT * FROM unnest(
    $1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::boolean[]
) ON CONFLICT DO NOTHING
"""
_FIND: Final = """
SELECT number, account.tenant, account.project, account.service, account.provider, account.model,
    account.operation, account.simulated
FROM accounts AS account JOIN unnest(
    $1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::boolean[]
) AS ask (tenant, project, service, provider, model, operation, simulated)
USING (tenant, project, service, provider, model, operation, simulated)
"""
_READ: Final = """
SELECT number, tenant, project, service, provider, model, operation, simulated
FROM accounts WHERE number = ANY($1::bigint[])
"""


class Accounts:
    """The accounts that this process has met."""

    def __init__(self) -> None:
        self.by_scope: dict[Scope, Account] = {}
        self.by_number: dict[int, Account] = {}

    async def know(self, connection: Connection, scopes: Collection[Scope]) -> None:
        """Number these scopes where they are new. A number, once given, is never taken back."""
        new = {scope for scope in scopes if scope not in self.by_scope}
        if not new:
            return
        if len(self.by_scope) + len(new) > _REMEMBERED_MAX:
            self.by_scope.clear()
            self.by_number.clear()
            new = set(scopes)
        columns = list(zip(*sorted(new), strict=True))
        await connection.execute(_ADD, *columns)
        self._remember(await connection.fetch(_FIND, *columns))

    async def know_numbers(self, connection: Connection, numbers: Collection[int]) -> None:
        """Remember the accounts of these numbers."""
        if new := sorted({number for number in numbers if number not in self.by_number}):
            self._remember(await connection.fetch(_READ, new))

    def _remember(self, rows: Iterable[asyncpg.Record]) -> None:
        for number, *scope in rows:
            account = Account(number, Scope(*scope))
            self.by_scope[account.scope] = self.by_number[account.number] = account
