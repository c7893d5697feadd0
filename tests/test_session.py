"""Ray that does not start or answer is one line, in the time that the user gave."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import ray

from pipelines.config import Scale
from pipelines.driver import cluster
from pipelines.driver.cluster import has_dashboard, ray_session, wait_for_address
from pipelines.driver.launch_ray import train_environment
from pipelines.driver.signals import stop_requests
from pipelines.errors import InterruptedRun


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a process that has joined no Ray, whatever other tests share."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


def raising(error: Exception) -> Callable[..., None]:
    def init(**settings: object) -> None:
        raise error

    return init


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_leads_nowhere_is_said_once_time_is_up(
    scheme: str, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{scheme}127.0.0.1:{closed_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "init", raising(AssertionError("it would try for ever")))
    said = rf"RAY_ADDRESS={address}, got none in 0\.2 s .*--scale\.start-timeout-s"
    with pytest.raises(ValueError, match=said), ray_session(Scale(start_timeout_s=0.2)):
        pass


def test_an_address_that_comes_later_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, sockets = closed_port(), list[socket.socket]()

    def sleep(seconds: float) -> None:
        sockets.append(socket.create_server(("127.0.0.1", port)))

    monkeypatch.setattr(time, "sleep", sleep)
    wait_for_address(f"127.0.0.1:{port}", timeout_s=60)
    assert len(sockets) == 1
    sockets[0].close()


@pytest.mark.parametrize("address", ["auto", "local", "[", "host:port"])
def test_what_names_no_host_and_port_is_rays_to_judge(address: str) -> None:
    wait_for_address(address, timeout_s=0)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/nonexistent/.ray"),
        OSError("AF_UNIX path length cannot exceed 107 bytes:\n /tmp/aaa"),
        RuntimeError("Version mismatch: The cluster was started with:\n Python: 3.11"),
        ConnectionError("ray client connection timeout"),
    ],
)
@pytest.mark.parametrize("is_joined", [False, True])
def test_what_ray_raises_is_one_line(
    error: Exception,
    is_joined: bool,
    no_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "init", raising(error))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if is_joined:
        monkeypatch.setenv("RAY_ADDRESS", "auto")
    name = type(error).__name__
    with pytest.raises(ValueError, match=name) as caught, ray_session(Scale()):
        pass
    assert "\n" not in str(caught.value)
    advice = "the same Python" if is_joined else "HOME"
    assert advice in str(caught.value)


def in_a_finalizer(number: int, frame: object) -> None:
    """Raise as Ray's own handler does, where Python ignores what is raised."""
    with contextlib.suppress(SystemExit):
        sys.exit(number)


def raised_in_ray(number: int, frame: object) -> None:
    sys.exit(1)


@pytest.mark.parametrize("handler", [in_a_finalizer, raised_in_ray])
def test_sigterm_while_ray_starts_ends_as_any_other(
    handler: Callable[[int, object], None],
    no_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**settings: object) -> None:
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)

    def begin() -> None:
        with stop_requests() as stop, ray_session(Scale()):
            stop.arm()

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InterruptedRun, match="SIGTERM") as caught:
        begin()
    assert caught.value.code == 128 + signal.SIGTERM


def test_a_ray_that_was_too_slow_to_start_is_started_once_more(
    no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [
        Exception("The current node timed out during startup. This could happen"),
        OSError("enough"),
    ]

    def init(**settings: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="enough"), ray_session(Scale()):
        pass
    assert not errors


def test_a_cluster_without_this_project_is_said(
    no_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray itself is joined; what its processes can't import shows in the first task."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", lambda **settings: None)

    def get(task: object, *, timeout: float) -> None:
        assert timeout >= 30
        raise ModuleNotFoundError("No module named 'pipelines'")

    class Task:
        def remote(self) -> str:
            return "task"

    monkeypatch.setattr(ray, "remote", lambda **settings: lambda function: Task())
    monkeypatch.setattr(ray, "get", get)
    said = r"'pipelines'; give it this project: `ray job submit --working-dir \.`"
    # Less time than the first process of a cluster takes to start.
    scale = Scale(start_timeout_s=0.2)
    with pytest.raises(ValueError, match=said), ray_session(scale):
        pass


def test_a_proxy_does_not_stand_before_this_machines_own_ray(
    no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.org")

    def init(**settings: object) -> None:
        seen.append(dict(os.environ))
        raise RuntimeError("enough")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match="enough"), ray_session(Scale()):
        pass
    (environment,) = seen
    for name in ("no_proxy", "NO_PROXY"):
        assert "127.0.0.1" in environment[name].split(",")
    assert environment["no_proxy"].startswith("example.org,")
    assert os.environ["no_proxy"] == "example.org"


@pytest.mark.ray
def test_only_a_dashboard_of_its_own_is_asked_for_a_run(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ray without one names an address at which another Ray's may answer."""
    assert has_dashboard()
    assert "RAY_API_SERVER_ADDRESS" not in train_environment(Scale())

    def asked(node_id: str, *, address: str, timeout: int) -> None:
        assert address == ray.get_runtime_context().gcs_address
        assert node_id == ray.get_runtime_context().get_node_id()

    monkeypatch.setattr(cluster, "get_node", asked)  # it knows no such node
    assert not has_dashboard()
    nowhere = train_environment(Scale())["RAY_API_SERVER_ADDRESS"]
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect((urlsplit(nowhere).hostname, urlsplit(nowhere).port))
