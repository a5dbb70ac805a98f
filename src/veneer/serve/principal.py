"""Who sent a request, and what that principal may do.

    principal = await tenancy.caller(key)      once per request, in `serve.http.app.Door`
    principal.require("train")                 403 without that permission
    principal.can_change("acme/support")       whether an adapter of that name is the principal's to change

Each route of the server and each handler of the Studio names the permission it needs: `needs` in `serve.http.guard`,
`permit` in `studio.parts`. A route or handler that names none is refused.

    kind        who                                         permissions
    stranger    sent no key, on a path that needs none      public
    key         a key of --api-keys                         public, infer, read, metrics
    tenant      a tenant's key                              public, infer, read, feedback, write, train
    open        anybody, on a server without keys           all but administer
    operator    the admin key; the server itself            all
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from veneer.serve.request import Refused

Permission = Literal["public", "infer", "read", "metrics", "feedback", "write", "train", "operate", "administer"]
"""public: health, sign in. infer: ask the base and visible adapters. read: browse what is visible of the library.
metrics: /metrics. feedback: rate answers. write: add, change and remove adapters of one's own. train: one's own files,
jobs, graders and Tinker sessions. operate: change the server for everybody, read the server's own files. administer:
tenants, keys, limits, prices and the audit log."""
_Kind = Literal["stranger", "key", "tenant", "open", "operator"]

_ALL = frozenset(get_args(Permission))
PERMISSIONS: dict[_Kind, frozenset[Permission]] = {
    "stranger": frozenset({"public"}),
    "key": frozenset({"public", "infer", "read", "metrics"}),
    "tenant": frozenset({"public", "infer", "read", "feedback", "write", "train"}),
    "open": _ALL - {"administer"},
    "operator": _ALL,
}
_DENIED: dict[Permission, tuple[str, str]] = {
    "metrics": ("metrics cover the requests of all tenants", "use the admin key"),
    "feedback": ("this key may not give feedback", "use a tenant's key or the admin key"),
    "write": ("this key may not change adapters", "use a tenant's key or the admin key"),
    "train": ("this key may not train", "use a tenant's key or the admin key"),
    "operate": ("admin key required", "use the admin key"),
    "administer": ("only the operator manages tenants", "use the admin key"),
}


@dataclass(frozen=True, eq=False)
class Principal:
    """`tenant`: "" for every kind but tenant. `sees(name)`: whether an adapter or a route of that name is visible.
    `user`: the client's own word for its end user, to which routes stick. `weight`: share of the engine."""

    kind: _Kind
    tenant: str = ""
    sees: Callable[[str], bool] = field(default=lambda name: True, repr=False)
    user: str | None = None
    weight: float = 1.0

    def can(self, permission: Permission) -> bool:
        """Whether this principal has the permission."""
        return permission in PERMISSIONS[self.kind]

    def require(self, permission: Permission | None) -> None:
        """Raises Refused (403) without the permission, and for None: a route or handler that names no permission."""
        if permission is None or not self.can(permission):
            what, fix = _DENIED.get(permission, ("this is not allowed", "use the admin key"))  # type: ignore[arg-type]
            raise Refused(what, status=403, code="forbidden", fix=fix)

    def can_change(self, name: str) -> bool:
        """Whether an adapter of this name is theirs: a tenant's are those of its namespace, an operator's are all."""
        return self.can("operate") or (self.can("write") and name.startswith(f"{self.tenant}/"))

    def can_see(self, *names: str) -> bool:
        """Whether any of these names of an adapter is visible."""
        return self.can("operate") or any(map(self.sees, names))

    @property
    def owner(self) -> str | None:
        """Whose jobs this principal sees: None for everybody's."""
        return None if self.can("operate") else self.tenant

    @property
    def actor(self) -> str:
        """What the audit log calls this principal."""
        return self.tenant or "operator"


STRANGER = Principal("stranger")
