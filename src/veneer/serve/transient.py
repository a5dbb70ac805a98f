"""Transient errors: a database, store, disk or upstream that is unavailable.

    is_transient(error)               whether an error or one of its causes is transient
    transient_error(resource, error)  a 503 that clients can retry; its id refers to details in the log
    internal_error(resource, error)   the same 503 if the error is transient, otherwise a 500

Driver messages contain hosts, paths and addresses, so they never reach a client.
"""

from __future__ import annotations

import errno
import logging
import secrets

from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from veneer.errors import ResourceError, UnavailableError, lacks_memory
from veneer.serve.request import Refused

log = logging.getLogger("veneer.serve")

_KINDS: tuple[type[BaseException], ...] = (UnavailableError, ResourceError, MemoryError)
_KINDS += (OperationalError, InterfaceError, PoolTimeout)
_KINDS += (ConnectionError, TimeoutError, PermissionError)
_ERRNO = {
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EBUSY,
}


def is_transient(error: BaseException | None) -> bool:
    """Return whether the environment, not the request, caused an error or one of its causes."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        if isinstance(error, _KINDS) or (isinstance(error, OSError) and error.errno in _ERRNO) or lacks_memory(error):
            return True
        if type(error) is DatabaseError:  # a damaged SQLite file; subclasses are raised for faulty statements
            return True
        visited.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def transient_error(resource: str, error: object) -> Refused:
    """Return the 503 response for an unavailable resource.

    resource: the resource's name for clients, such as "the library".
    error: the cause, which is only logged.
    """
    fix = f"try again; the server's log has details under {_logged(resource, error)}"
    message = f"{resource} cannot be used at the moment"
    return Refused(message, status=503, code="unavailable", retry_after=2.0, fix=fix)


def internal_error(resource: str, error: BaseException) -> Refused:
    """Return the response for an unexpected exception: 503 if it is transient, otherwise 500."""
    if is_transient(error):
        return transient_error(resource, error)
    number = _logged(resource, error, trace=True)
    return Refused(
        f"{resource} failed here", status=500, code="internal", fix=f"the server's log has details under {number}"
    )


def _logged(resource: str, error: object, *, trace: bool = False) -> str:
    """Log an error and return the id of the log entry.

    trace: also log the traceback. Transient errors omit it, because there can be many.
    """
    number = secrets.token_hex(4)
    text = " ".join(str(error).split()) or type(error).__name__
    kind = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
    log.error("%s: %s: %s%s", number, resource, kind, text[:2000], exc_info=error if trace else None)  # type: ignore[arg-type]
    return number
