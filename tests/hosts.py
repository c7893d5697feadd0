"""Run several hosts on this machine, each with its address, processes and home.

A host is a set of Linux namespaces whose first process is sshd: killing it turns the
host off. A switch joins them; no address of theirs is this machine's, so what they say
stays among them. The user's home is an overlay: a host sees this machine's files there,
and what it writes is its own and outlives it, as on a disk.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
HOME = Path.home()
_NETWORK = "10.213.7"
_PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh", "rsync", "curl")
# `su` and cron leave it without the folders that sshd and ip are in.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")
_AS_FIRST = ("--fork", "--kill-child", "--mount-proc")
_DYING_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_OPTIONS = """\
HostKey /run/host/host_key
AuthorizedKeysFile /run/host/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
MaxStartups 50
MaxSessions 50
"""
# What not every machine lets one do.
_TRIAL = """\
set -e
mount --make-rprivate /
mkdir "$FOLDER/home" "$FOLDER/work"
mount -t overlay overlay \
  -o "lowerdir=$HOME,upperdir=$FOLDER/home,workdir=$FOLDER/work" "$HOME"
ip link add one type veth peer name other
"""
# What is under /tmp would be hidden, so the folders that stay are bound first.
_BOOT = """\
set -e
mount --make-rprivate /
hostname "$NAME"
mount -t tmpfs tmpfs /run
mkdir /run/sshd /run/host /run/project
mount --bind "$FOLDER" /run/host
mount --bind "$ROOT" /run/project
mount -t overlay overlay \
  -o "lowerdir=$HOME,upperdir=$FOLDER/home,workdir=$FOLDER/work" "$HOME"
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
mkdir -p "$ROOT"
mount --bind /run/project "$ROOT"
# As Debian has it: a trap for what asks for the address of its own name.
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$NAME" > /run/hosts
mount --bind /run/hosts /etc/hosts
ip link set lo up
exec /usr/sbin/sshd -D -f /run/host/sshd_config -E /run/host/sshd.log
"""


@functools.cache
def lacking() -> str:
    """Return what this machine lacks to run hosts; "" if nothing."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in _PROGRAMS if not shutil.which(name, path=_PATH)]
    if missing:
        return f"needs {', '.join(missing)}: openssh-server, iproute2, rsync, curl"
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(
            ["unshare", *_NAMESPACES, "--fork", "sh", "-c", _TRIAL],
            env={"PATH": _PATH, "HOME": str(HOME), "FOLDER": folder},
            capture_output=True,
            text=True,
        )
    return f"no hosts here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(kw_only=True)
class Host:
    """One host, on or off."""

    name: str
    address: str
    folder: Path
    switch_pid: int
    _process: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        """Folder with what was written in its user's home."""
        return self.folder / "home"

    def turn_on(self) -> None:
        """Start it, and wait until its sshd listens."""
        environment = {"NAME": self.name, "FOLDER": str(self.folder)}
        environment |= {"ROOT": str(ROOT), "HOME": str(HOME), "PATH": _PATH}
        self._process = subprocess.Popen(
            [*_DYING_WITH_US, "unshare", *_NAMESPACES, *_AS_FIRST, "sh", "-c", _BOOT],
            env=environment,
            stderr=(self.folder / "boot.log").open("ab"),
        )
        wait_for(lambda: bool(self.pid), what=f"{self.name} to start")
        port = f"port{self.address.rpartition('.')[2]}"
        enter = ["nsenter", "-t", str(self.switch_pid), "-n", "ip", "link"]
        peer = ["peer", "name", "eth0", "netns", str(self.pid)]
        _check([*enter, "add", port, "type", "veth", *peer])
        _check([*enter, "set", port, "master", "switch", "up"])
        into = ["nsenter", "-t", str(self.pid), "-n", "ip"]
        _check([*into, "addr", "add", f"{self.address}/24", "dev", "eth0"])
        _check([*into, "link", "set", "eth0", "up"])
        wait_for(lambda: self._listens(), what=f"sshd of {self.name}")

    def turn_off(self) -> None:
        """Kill all its processes at once, as a power cut does."""
        assert self._process is not None
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    @property
    def pid(self) -> int:
        """Process id of its first process; 0 if it is off."""
        if self._process is None or self._process.poll() is not None:
            return 0
        parent = self._process.pid
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:
            return 0
        return int((children.split() or ["0"])[0])

    def command(self, text: str, **variables: str) -> list[str]:
        """Build the command that runs a shell command on it, as in a login."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p"]
        settled = {"HOME": str(HOME), "PATH": _PATH, "USER": "root"} | variables
        pairs = [f"{name}={value}" for name, value in settled.items()]
        return [*enter, "env", "-i", *pairs, "bash", "-c", f"cd; {text}"]

    def run(self, text: str, *, timeout_s: float = 300, **variables: str) -> str:
        """Run a shell command on it; return its output, or fail with it."""
        done = subprocess.run(
            self.command(text, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{self.name}: {text}\n{done.stdout}"
        return done.stdout

    def _listens(self) -> bool:
        assert self.pid, (self.folder / "boot.log").read_text()
        log = self.folder / "sshd.log"
        return log.exists() and log.read_text().count("0.0.0.0") > 0


@contextlib.contextmanager
def hosts_on(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Start hosts that reach each other; the first one has the key to all."""
    switch = subprocess.Popen(
        [*_DYING_WITH_US, "unshare", "--net", "sleep", "infinity"]
    )
    enter = ["nsenter", "-t", str(switch.pid), "-n", "ip", "link"]
    made: dict[str, Host] = {}
    try:
        # unshare becomes sleep in the same process.
        wait_for(lambda: _is_apart(switch.pid), what="the switch")
        _check([*enter, "add", "switch", "type", "bridge"])
        _check([*enter, "set", "switch", "up"])
        for number, name in enumerate(names, start=1):
            made[name] = Host(
                name=name,
                address=f"{_NETWORK}.{number}",
                folder=folder / name,
                switch_pid=switch.pid,
            )
            _prepare(made[name].folder)
        key = made[names[0]].home / ".ssh" / "sovit_cluster"
        key.parent.mkdir(mode=0o700)
        _check(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
        public = key.with_suffix(".pub").read_text()
        for host in made.values():
            (host.folder / "authorized_keys").write_text(public)
            host.turn_on()
        yield made
    finally:
        for host in made.values():
            if host.pid:
                host.turn_off()
        switch.kill()
        switch.wait()


def _prepare(folder: Path) -> None:
    for name in ("home", "work"):
        (folder / name).mkdir(parents=True)
    (folder / "sshd_config").write_text(_OPTIONS)
    key = str(folder / "host_key")
    _check(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])


def _is_apart(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def _check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
