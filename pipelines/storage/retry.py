"""Retry where a store fails for a moment, and raise plain errors where it refuses.

A store is whatever an address with a scheme names, but for `file://`. Local files are
never retried: what fails there fails for a reason that stays.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipelines.storage.redaction import error_summary, without_credentials

logger = logging.getLogger(__name__)

T = TypeVar("T")
# pyarrow's client makes three requests of its own before it gives up: counted with a
# server that answers 503 or cuts every connection, in 0.5 to 2 s. So a store that is
# down gets 15 requests in 15 s and some. (`FileSystem.from_uri` builds a client that
# makes 31 in 6 s for each try, at a steady rate: no help to a store that is slow.)
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_JITTER = 0.25
_PASSING = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|"
    r"THROTTLING|REQUEST_TIMEOUT|CLIENT_SIGNING_FAILURE)|"
    r"HTTP status (408|429|5\d\d)|"
    r"google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|"
    r"RESOURCE_EXHAUSTED|UNKNOWN)|"
    r"curlCode|timed? ?out|connection|temporar|unavailable|too many requests|slow down",
    re.IGNORECASE,
)
_PASSING_CODES = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EPIPE, errno.ETIMEDOUT}
    | {errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET}
    | {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ESTALE}
)
_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN|"
    r"INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE|UNRECOGNIZED_CLIENT|"
    r"MISSING_AUTHENTICATION_TOKEN|HTTP status 40[13]|"
    r"Status\((PERMISSION_DENIED|UNAUTHENTICATED)"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '[^']*' not found")
_GONE = re.compile(r"AWS Error (NO_SUCH_KEY|RESOURCE_NOT_FOUND)|HTTP status 404")


def is_remote(address: str) -> bool:
    """Check whether a place is reached by requests: anything but a local path."""
    return "://" in address and not address.startswith("file://")


def retrying(
    function: Callable[[], T],
    *,
    address: str,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call a function that reads or writes at an address, with up to four retries.

    Backoff: 1, 2, 4 and 8 s, give or take a quarter, with a warning for
    each. Only passing faults are retried: refused, missing and damaged files are not.

    Raises:
        ConnectionError: The last try failed like those before.
        ValueError: The store refuses these credentials, or has no such bucket.
        FileNotFoundError: The store has no such file.
        OSError: Any other error of the function, as it came.
    """
    if not is_remote(address):
        return function()
    name = without_credentials(address)
    waits_s = iter(_WAITS_S)
    while True:
        try:
            return function()
        except OSError as error:
            if not _may_pass(error):
                explained = _explained(error, name=name)
                if explained is None:
                    raise
                raise explained from error
            wait_s = next(waits_s, None)
            if wait_s is None:
                raise _no_answer(error, name=name) from error
            wait_s *= 1 + _JITTER * random.SystemRandom().uniform(-1, 1)
            logger.warning(
                "%s: %s; trying again in %.1f s", name, error_summary(error), wait_s
            )
            sleep(wait_s)


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Raise a ConnectionError of a store as ValueError: the user has to fix that."""
    try:
        yield
    except ConnectionError as error:
        raise ValueError(str(error)) from error


def _no_answer(error: OSError, *, name: str) -> ConnectionError:
    return ConnectionError(
        f"{name}: expected an answer of the store, got {error_summary(error)} at the "
        f"last of {len(_WAITS_S) + 1} tries; see whether it is up and can be reached "
        "(AWS_ENDPOINT_URL names one that is not Amazon's)"
    )


def _may_pass(error: OSError) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    text = str(error)
    if any(known.search(text) for known in (_REFUSED, _NO_BUCKET, _GONE)):
        return False
    if error.errno in _PASSING_CODES or isinstance(error, ConnectionError):
        return True
    # A damaged file is an OSError too, without a code and in many words.
    return isinstance(error, TimeoutError) or bool(_PASSING.search(text))


def _explained(error: OSError, *, name: str) -> ValueError | OSError | None:
    text, summary = str(error), error_summary(error)
    if _REFUSED.search(text):
        return ValueError(
            f"{name}: expected a store that lets us in, got {summary}; set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (or what this "
            "store takes), and see what they are allowed"
        )
    if _NO_BUCKET.search(text):
        return ValueError(
            f"{name}: expected a bucket that is there, got {summary}; mend its name, "
            "make it, or set AWS_ENDPOINT_URL for a store that is not Amazon's"
        )
    if _GONE.search(text):
        return FileNotFoundError(errno.ENOENT, f"not in the store ({summary})", name)
    return None
