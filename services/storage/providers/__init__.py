"""Storage's providers: every file here is one, and its name is the provider's.

A provider's file has `provide(means)`, which makes it from what the daemon has.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import cast

from services.storage.provider import Means, Provider


def names() -> list[str]:
    """The name of every provider that there is, sorted."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__))


def provided(name: str, means: Means) -> Provider:
    """The provider of this name, which must be one of `names()`."""
    provide = cast(Callable[[Means], Provider], import_module(f"{__name__}.{name}").provide)
    return provide(means)
