"""What is nobody's fault who asks: a database, a store, a disk or a replica that cannot be used now.

    is_outage(error)            whether it is one, whatever it was raised as on its way
    outage(what, error)         503, to be tried again; the log has the rest under the id that the answer carries
    fault(what, error)          the same for one, 500 for an error of ours

What a driver says holds hosts, paths and addresses, so a caller never sees it, least of all one that nobody knows yet.
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

_RETRY_AFTER = 2.0
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


def is_outage(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is of the machines and not of what was asked."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, _KINDS) or (isinstance(error, OSError) and error.errno in _ERRNO) or lacks_memory(error):
            return True
        if type(error) is DatabaseError:  # SQLite's of a damaged file; kinds of it are of what was asked of a database
            return True
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def outage(what: str, error: object, *, retry_after: float = _RETRY_AFTER) -> Refused:
    """The answer while `what` (in a caller's words: "the library") cannot be used. `error` goes to the log alone."""
    number = _logged(what, error)
    return Refused(
        f"{what} cannot be used at the moment",
        status=503,
        code="unavailable",
        retry_after=retry_after,
        fix=f"try again; the server's log has {number}",
    )


def fault(what: str, error: BaseException) -> Refused:
    """The answer to an error that is not what was asked for: an outage, or a fault of ours."""
    if is_outage(error):
        return outage(what, error)
    number = _logged(what, error, trace=True)
    return Refused(f"{what} failed here", status=500, code="internal", fix=f"the server's log has {number}")


def _logged(what: str, error: object, *, trace: bool = False) -> str:
    """An id under which the log has the error: in one line for an outage, of which there may be many."""
    number = secrets.token_hex(4)
    told = " ".join(str(error).split()) or type(error).__name__
    kind = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
    log.error("%s: %s: %s%s", number, what, kind, told[:2000], exc_info=error if trace else None)  # type: ignore[arg-type]
    return number
