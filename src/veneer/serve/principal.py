"""Principals: who sent a request, and with which permissions.

    principal = await tenancy.authenticate(key)  once per request, in `serve.http.app.AuthMiddleware`
    principal.require("train")                   403 unless the principal has this permission
    principal.can_change("acme/support")         whether the principal can change an adapter with this name

Each route of the server and each handler of the Studio declares the permission that it needs (with `needs` in
`serve.http.guard`, or `permit` in `studio.parts`). A route or handler that declares no permission is refused.

    kind        who                                         permissions
    stranger    sent no key, on a path that requires none   public
    key         a key from --api-keys                       public, infer, read, metrics
    door        a front door: the key VENEER_UPSTREAM_KEY   those of a key, delegate
    tenant      a tenant's key, or a token of its users     those of its roles
    open        anyone, on a server without keys            all except administer, keys, audit, delegate
    operator    the admin key; the server itself            all

    role of a tenant's key or user                          permissions
    caller                                                  public, infer, read, feedback
    trainer     (keys without a role)                       a caller's, write, train
    auditor                                                 public, audit
    owner                                                   a trainer's, keys, audit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from veneer.serve.request import Refused, invalid

Permission = Literal[
    "public",
    "infer",
    "read",
    "metrics",
    "feedback",
    "write",
    "train",
    "keys",
    "audit",
    "delegate",
    "operate",
    "administer",
]
"""What each permission allows.

public: check health, sign in
infer: use the base and visible adapters
read: browse visible adapters in the library
metrics: read /metrics
feedback: rate answers
write: add, change and remove the principal's own adapters
train: use the principal's own files, jobs and Tinker sessions
keys: list, create and revoke the keys of the principal's own tenant
audit: read the usage and the audit log of the principal's own tenant
delegate: name the tenant that a request is scheduled for
operate: change the server for all users, read the server's own files
administer: manage tenants, keys, limits and prices; read the audit log
"""
FAIRNESS, WEIGHT = "x-llm-d-inference-fairness-id", "x-veneer-weight"
"""Headers in which a front door names a tenant, as a keyed hash, and its weight."""
_Kind = Literal["stranger", "key", "door", "tenant", "open", "operator"]
Role = Literal["owner", "trainer", "caller", "auditor"]

_ALL = frozenset(get_args(Permission))
_CALLER: frozenset[Permission] = frozenset({"public", "infer", "read", "feedback"})
ROLES: dict[Role, frozenset[Permission]] = {
    "caller": _CALLER,
    "trainer": _CALLER | {"write", "train"},
    "auditor": frozenset({"public", "audit"}),
    "owner": _CALLER | {"write", "train", "keys", "audit"},
}
PERMISSIONS: dict[_Kind, frozenset[Permission]] = {
    "stranger": frozenset({"public"}),
    "key": frozenset({"public", "infer", "read", "metrics"}),
    "door": frozenset({"public", "infer", "read", "metrics", "delegate"}),
    "tenant": ROLES["trainer"],
    "open": _ALL - {"administer", "keys", "audit", "delegate"},
    "operator": _ALL,
}
_DENIED: dict[Permission, tuple[str, str]] = {
    "infer": ("this key is not allowed to use models", "use a key with the role caller, trainer or owner"),
    "read": ("this key is not allowed to browse adapters", "use a key with the role caller, trainer or owner"),
    "metrics": ("this key is not allowed to read metrics, which cover all tenants", "use the admin key"),
    "feedback": ("this key is not allowed to give feedback", "use a tenant's key or the admin key"),
    "write": ("this key is not allowed to change adapters", "use a tenant's key (trainer, owner) or the admin key"),
    "train": ("this key is not allowed to train", "use a tenant's key (trainer, owner) or the admin key"),
    "keys": ("this key is not allowed to manage keys", "use a key with the role owner"),
    "audit": ("this key is not allowed to read usage and the audit log", "use a key with the role owner or auditor"),
    "operate": ("admin key required", "use the admin key"),
    "administer": ("only the operator can manage tenants", "use the admin key"),
}


@dataclass(frozen=True, eq=False)
class Principal:
    """The sender of a request.

    `tenant`: "" except for kind "tenant". `sees(name)`: whether an adapter or route of this name is visible.
    `user`: the client's ID for its end user; a route gives each user the same target every time. `weight`:
    relative share of the engine. `roles`: of kind "tenant", whose permissions are those of all its roles.
    `identity`: `key:` and the key's id, or `oidc:` and the user's subject. `queue`: the tenant that a front door
    named, for scheduling only; see `serving`.
    """

    kind: _Kind
    tenant: str = ""
    sees: Callable[[str], bool] = field(default=lambda name: True, repr=False)
    user: str | None = None
    weight: float = 1.0
    roles: tuple[Role, ...] = ("trainer",)
    identity: str = ""
    queue: str = ""

    def can(self, permission: Permission) -> bool:
        """Return whether this principal has the permission."""
        if self.kind == "tenant":
            return any(permission in ROLES[role] for role in self.roles)
        return permission in PERMISSIONS[self.kind]

    def require(self, permission: Permission | None) -> None:
        """Raise Refused (403) unless the principal has the permission.

        None, for a permission that was not declared, is always refused.
        """
        if permission is None or not self.can(permission):
            text, fix = _DENIED.get(permission, ("this is not allowed", "use the admin key"))  # type: ignore[arg-type]
            raise Refused(text, status=403, code="forbidden", fix=fix)

    def can_change(self, name: str) -> bool:
        """Return whether the principal can change an adapter with this name.

        A tenant can change names in its namespace. A principal that can operate the server can change any
        name.
        """
        return self.can("operate") or (self.can("write") and name.startswith(f"{self.tenant}/"))

    def can_see(self, *names: str) -> bool:
        """Return whether any of an adapter's `names` is visible to the principal."""
        return self.can("operate") or any(map(self.sees, names))

    def serving(self, headers: Mapping[str, str]) -> Principal:
        """Return this principal with the tenant that a front door names, so that all doors share its queue.

        The headers are ignored unless the principal can delegate. Raises Refused (400) for a wrong weight.
        """
        tenant = headers.get(FAIRNESS)
        if not tenant or not self.can("delegate"):
            return self
        try:
            share = float(headers.get(WEIGHT, "1"))
        except ValueError:
            share = 0.0
        if not 0.001 <= share <= 1000:  # as for a tenant's weight; also false for NaN
            raise invalid(f"{WEIGHT} must be a number from 0.001 to 1000", fix="send the tenant's weight")
        return replace(self, queue=f"~{tenant}", weight=share)

    @property
    def scheduled_as(self) -> str:
        """The tenant in whose queue the principal's requests wait."""
        return self.queue or self.tenant

    @property
    def owner(self) -> str | None:
        """The tenant whose jobs this principal sees, or None for the jobs of all tenants."""
        return None if self.can("operate") else self.tenant

    @property
    def actor(self) -> str:
        """The principal's name in the audit log."""
        return "/".join(filter(None, (self.tenant or "operator", self.identity)))


STRANGER = Principal("stranger")
