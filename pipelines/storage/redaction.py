"""Redact secrets in what is shown: an address without its password or signature."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

_MAX_ERROR_CHARS = 300
_HIDDEN = "***"
# These can't stand inside an address and end the search for it, so that JSON and
# sentences around addresses stay whole.
_ENDS = re.compile(r"[\s\"'<>]")
# `user:password@` after a scheme, up to the last @: bucket secrets may hold slashes
# that nobody escaped. `host:8080/a@b` is none.
_PASSWORD = re.compile(r"(?<=://)[^\s\"'<>/@:]*:[^\s\"'<>]*@")
_PORT = re.compile(r"[^:]*:\d{1,5}/")
_USER_INFO = re.compile(r"(?<=://)[^\s\"'<>/]*@")
_SECRET_ARGUMENT = re.compile(
    r"([?&#;][^\s\"'<>=&#;]*"
    r"(?:key|secret|token|passw|passphrase|pwd|signature|credential|sig|sas|auth)"
    r"[^\s\"'<>=&#;]*=)[^\s\"'<>&#;]*",
    re.IGNORECASE,
)
# Before the @ stands a container, or the name of a user, which is no secret.
_NAMED = frozenset({"abfs", "abfss", "wasb", "wasbs", "hdfs", "webhdfs", "ssh", "sftp"})
_WITHOUT_PORTS = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "wasb", "wasbs"})
_SCHEME = re.compile(r"[\w+.-]*$")
_LONGEST_SCHEME = 16


def without_credentials(text: str) -> str:
    """Remove users, passwords and secret arguments from every address in a text.

    `https://me:word@host/a?token=x` becomes `https://host/a?token=***`. Where what
    stands first is a container's or a user's name, it stays: `abfs://box@account/a`.
    """
    for pattern in (_PASSWORD, _USER_INFO):
        text = pattern.sub(_name_alone, text)
    return _SECRET_ARGUMENT.sub(rf"\1{_HIDDEN}", text)


def holds_secret(address: str) -> bool:
    """Check whether one address, with no text around it, holds a secret."""
    plain = _ENDS.sub("_", address)
    return without_credentials(plain) != plain


def _name_alone(found: re.Match[str]) -> str:
    end = found.start() - len("://")
    before = _SCHEME.search(found.string, max(end - _LONGEST_SCHEME, 0), end)
    scheme = before[0].lower() if before else ""
    if scheme not in _WITHOUT_PORTS and _PORT.match(found[0]):
        return found[0]
    name = found[0][:-1].partition(":")[0]
    return f"{name}@" if name and scheme in _NAMED else ""


def error_summary(error: BaseException) -> str:
    """Summarize an error in its type and first line, without credentials.

    Long lines are cut, but a ValueError's, which ends with what to do.
    """
    line = next(iter(without_credentials(str(error)).strip().splitlines()), "")
    end = None if isinstance(error, ValueError) else _MAX_ERROR_CHARS
    return f"{type(error).__name__}: {line[:end]}"


def command_line(program: str, *arguments: object) -> str:
    """Format a command of ours or MLflow's, quoted where a shell needs it.

    A program that is not on PATH gets its folder; addresses lose their secrets.
    """
    beside = Path(sys.executable).with_name(program)
    is_found = shutil.which(program) or not beside.exists()
    words = [program if is_found else os.path.relpath(beside)]
    return shlex.join([*words, *(without_credentials(str(word)) for word in arguments)])
