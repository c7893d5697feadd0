"""Serve an MLflow store on loopback, and open its pages in headless Chromium."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.request import urlopen

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_START_S = 240.0
_STOP_S = 10.0
_PAGE_S = 120.0
_STILL_S = 0.5
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_SERVER_SETTINGS = MappingProxyType(
    {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Its job runner is a process of its own, and takes seconds to start.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
)
# MLflow's page opens a chat panel on first sight, over a third of its width, and shows
# the rooms for language models: as somebody has it who has been there before.
_VISITED = MappingProxyType(
    {
        "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
        "mlflow.workflowType_v1": '"machine_learning"',
    }
)


def find_browser() -> tuple[str, str] | None:
    """Find Chromium and its driver; None if one of them isn't installed."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextlib.contextmanager
def mlflow_server(uri: str, *, folder: Path) -> Iterator[str]:
    """Serve the store `uri` on a free loopback port; yield the server's URL.

    `folder` gets its log and the artifacts that are sent to it.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | _SERVER_SETTINGS,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for_server(server, address=address, log=folder / "server.log")
        yield address
    finally:
        _stop(server)


def _wait_for_server(
    server: subprocess.Popen[bytes], *, address: str, log: Path
) -> None:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and server.poll() is None:
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"MLflow's server didn't start: {log.read_text()[-2000:]}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop a server and the processes in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_S)


@contextlib.contextmanager
def open_page(
    url: str, *, wait_for: str, width: int = 1400, height: int = 900
) -> Iterator[Chrome]:
    """Open a page, and wait until it matches the CSS selector `wait_for` and is still.

    `width` and `height` are the page's, in pixels. Raises RuntimeError if there is no
    Chromium, and selenium's TimeoutException if `wait_for` doesn't appear.
    """
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import (
        presence_of_element_located,
    )
    from selenium.webdriver.support.wait import WebDriverWait

    page = _start(width=width, height=height)
    try:
        page.get(url)
        found = presence_of_element_located((By.CSS_SELECTOR, wait_for))
        WebDriverWait(page, _PAGE_S).until(found, f"no {wait_for!r} in {url}")
        _wait_until_still(page)
        yield page
    finally:
        page.quit()


def picture(
    url: str, path: Path, *, wait_for: str, width: int = 1400, height: int = 900
) -> None:
    """Save a page's screenshot to the PNG `path`; see `open_page` for `wait_for`.

    Selectors of MLflow: `.parcoords .axis-title` on the page that compares runs,
    `.parcoords .label` in a view of charts.
    """
    with open_page(url, wait_for=wait_for, width=width, height=height) as page:
        path.write_bytes(page.get_screenshot_as_png())


def _start(*, width: int, height: int) -> Chrome:
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    found = find_browser()
    if found is None:
        raise RuntimeError(
            f"expected chromedriver and one of {', '.join(_BROWSERS)}, got no such "
            "programs; install chromium and chromium-driver"
        )
    options = ChromeOptions()
    options.binary_location, driver = found
    options.add_argument("--headless=new")
    options.add_argument("--no-first-run")
    options.add_argument("--disable-background-networking")
    options.add_argument("--disable-dev-shm-usage")
    # MLflow draws the lines by WebGL: without a GPU, in software.
    options.add_argument("--enable-unsafe-swiftshader")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    # Given a driver, selenium doesn't look for one on the network.
    page = Chrome(options=options, service=Service(executable_path=driver))
    # The window's size would count the frame, which even a headless one has.
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    source = "".join(
        f"localStorage.setItem({key!r}, {value!r});" for key, value in _VISITED.items()
    )
    page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    return page


def _wait_until_still(page: Chrome) -> None:
    """Wait until a page looks the same twice: charts come after their labels."""
    deadline_s = time.monotonic() + _PAGE_S
    before = b""
    while time.monotonic() < deadline_s:
        now = page.get_screenshot_as_png()
        if now == before:
            return
        before = now
        time.sleep(_STILL_S)
    raise RuntimeError(f"the page still moves after {_PAGE_S:.0f} s: {page.title}")
