"""All grants of the store in memory, by the tenant that has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from foundry.store import Grant, GrantStore
from foundry.store.objects.known import Known
from services.gateway.access.remembered import Remembered


class Grants(Remembered[Grant]):
    def __init__(self, store: GrantStore) -> None:
        super().__init__("grants", store)
        self._names: Mapping[str, set[str]] = {}
        # What `_names` was made of.
        self._indexed: Mapping[str, Known[Grant]] = {}

    def of(self, tenant: str | None) -> frozenset[str]:
        """Names of other tenants' cartridges that this one may query."""
        if self._indexed is not self._known:
            names = defaultdict(set)
            for known in self._known.values():
                if known.value is not None:
                    names[known.value.tenant].add(known.value.name)
            self._names, self._indexed = names, self._known
        return frozenset(self._names.get(tenant or "", ()))
