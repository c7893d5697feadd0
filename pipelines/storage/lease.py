"""Lease on a run or a sweep: one process at a time works on it.

On a disk that is a file lock: the kernel frees it when its holder dies, however that
happens. A bucket has no locks: there the holder writes its name every few seconds, and
whoever comes waits to see whether it still does. Of two that come to a bucket within
the same second the last to write has it, unless the store takes longer than that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary
from pipelines.storage.retry import answering

logger = logging.getLogger(__name__)

OWNER_FILE = "owner.json"
_BEAT_S = 15.0
# Two beats and what a slow request takes.
_WATCH_S = 40.0
_SETTLE_S = 1.0
_POLL_S = 0.5
_HAS_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Process that works on a run or a sweep."""

    command: str
    host: str
    machine: str
    """Boot and process namespace: where it is the same, `pid` means the same."""
    pid: int
    start: str
    """When the process started, by the kernel's clock: ids are used again."""
    since: str
    token: str
    beat: int = 0

    @property
    def is_dead(self) -> bool:
        """Whether it ran on this machine and is gone."""
        return self.machine == _machine() and _start_of(self.pid) != self.start


@contextlib.contextmanager
def claimed(folder: StoragePath, *, patience_s: float = 0.0) -> Iterator[None]:
    """Claim a run's or a sweep's folder, which is made where it is not there.

    Folders that were made for that and are empty at the end are deleted again.

    Args:
        patience_s: Timeout for another holder to let go.

    Raises ValueError naming the process that holds it, and where nothing can be
    written.
    """
    owner = _this_process()
    deadline_s = time.monotonic() + patience_s
    while (hold := _taken(folder, owner=owner)) is None:
        if time.monotonic() >= deadline_s:
            raise _busy(folder, owner=_read(folder))
        time.sleep(_POLL_S)
    with hold:
        yield


def _taken(
    folder: StoragePath, *, owner: Owner
) -> contextlib.AbstractContextManager[None] | None:
    """Take the lease on a folder; None where another process has it."""
    if folder.is_remote:
        return _beating(folder, owner=owner)
    try:
        lock = _locked(Path(folder.open()[1]), owner=owner)
    except OSError as error:
        if error.errno in _HAS_NO_LOCKS:
            return _beating(folder, owner=owner)
        raise ValueError(
            f"storage: expected a place that can be written, got {str(folder)!r} "
            f"({error_summary(error)}); set --storage"
        ) from error
    return None if lock is None else _unlocked_at_end(lock)


def _locked(folder: Path, *, owner: Owner) -> _Lock | None:
    path = folder / OWNER_FILE
    made = tuple(part for part in (folder, *folder.parents) if not part.exists())
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _opened_and_locked(path)
        except FileNotFoundError:  # its last holder has just deleted the folder
            continue
        except BlockingIOError:
            return None
        if _is_at(descriptor, path=path):
            try:
                path.write_bytes(_bytes(owner))
            except OSError:
                os.close(descriptor)
                raise
            return _Lock(path, descriptor, made)
        os.close(descriptor)  # deleted between the two calls


def _opened_and_locked(path: Path) -> int:
    # Not for writing, else the disk can't be made read-only meanwhile. NFS wants it so.
    for mode in (os.O_RDONLY, os.O_RDWR):
        descriptor = os.open(path, mode | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EBADF and mode == os.O_RDONLY:
                continue
            raise
        return descriptor
    raise AssertionError("unreachable")


class _Lock(NamedTuple):
    file: Path
    descriptor: int
    made: tuple[Path, ...]
    """Folders that were made for it, the innermost first."""


def _is_at(descriptor: int, *, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _unlocked_at_end(lock: _Lock) -> Iterator[None]:
    path, descriptor, made = lock
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_at(descriptor, path=path):
                path.unlink()
            for folder in made:
                folder.rmdir()  # only where nothing else is in it
        os.close(descriptor)


def _beating(
    folder: StoragePath, *, owner: Owner
) -> contextlib.AbstractContextManager[None] | None:
    with answering():
        before = _read(folder)
        if before is not None and not before.is_dead:
            if before.machine == owner.machine:
                return None
            logger.info(
                "%s: waiting %.0f s to see whether %s still works on it",
                folder,
                _WATCH_S,
                _named(before),
            )
            time.sleep(_WATCH_S)
            if _read(folder) not in (None, before):
                return None
        folder.make_folder()
        _write(folder, owner=owner)
        time.sleep(_SETTLE_S)
        now = _read(folder)
        if now is None or now.token != owner.token:
            return None
    return _beaten_until_end(folder, owner=owner)


@contextlib.contextmanager
def _beaten_until_end(folder: StoragePath, *, owner: Owner) -> Iterator[None]:
    is_over = threading.Event()

    def beat() -> None:
        number = 0
        while not is_over.wait(_BEAT_S):
            number += 1
            try:
                if (now := _read(folder)) is not None and now.token != owner.token:
                    logger.warning(
                        "%s is also worked on by %s, which took this process for dead; "
                        "end one of the two",
                        folder,
                        _named(now),
                    )
                    return
                _write(folder, owner=dataclasses.replace(owner, beat=number))
            except (OSError, ValueError) as error:  # the next beat tries again
                logger.warning("%s: no sign of life: %s", folder, error_summary(error))

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(_BEAT_S)
        with contextlib.suppress(OSError, ValueError):
            if (now := _read(folder)) is not None and now.token == owner.token:
                folder.within(OWNER_FILE).delete()


def _this_process() -> Owner:
    return Owner(
        command=Path(sys.argv[0]).name or "python",
        host=platform.node(),
        machine=_machine(),
        pid=os.getpid(),
        start=_start_of(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        token=uuid.uuid4().hex,
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()


def _start_of(pid: int) -> str:
    """Read when a process started; "" where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The name, in brackets, may hold anything; the state follows it.
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def _read(folder: StoragePath) -> Owner | None:
    try:
        return Owner(**json.loads(folder.within(OWNER_FILE).read()))
    except (FileNotFoundError, TypeError, json.JSONDecodeError):
        return None  # nobody's, or one that is being written


def _write(folder: StoragePath, *, owner: Owner) -> None:
    folder.within(OWNER_FILE).write(_bytes(owner))


def _bytes(owner: Owner) -> bytes:
    return json.dumps(dataclasses.asdict(owner)).encode()


def _named(owner: Owner | None) -> str:
    if owner is None:
        return "another process"
    return f"{owner.command} (process {owner.pid} on {owner.host}, since {owner.since})"


def _busy(folder: StoragePath, *, owner: Owner | None) -> ValueError:
    return ValueError(
        f"expected a name that nobody works on, got {folder.name!r} in "
        f"{str(folder)!r}, which {_named(owner)} works on; wait for its end, or choose "
        "another --name"
    )
