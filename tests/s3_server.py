"""Serve the S3 protocol on loopback, with injected network and store faults.

The store is moto's, in this process. Between it and the client, `Line` records every
request, and can refuse some, cut their connection or delay them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from unittest import mock
from urllib.request import urlopen
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import boto3
from moto import settings
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    create_backend_app,
)
from werkzeug.serving import WSGIRequestHandler, make_server

Fault = Literal["503", "cut", "cut within"]
BUCKET = "bucket"
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class _Order:
    """Pattern of requests to fail, and how many are left."""

    pattern: re.Pattern[str]
    fault: Fault
    num_left: int


class Line:
    """Proxy of a store that records requests and injects faults."""

    def __init__(self, store: WSGIApplication) -> None:
        self.latency_s = 0.0
        self.most_at_once = 0
        """The most requests that waited for their answers together."""
        self._num_waiting = 0
        self._store = store
        self._requests: list[str] = []
        self._orders: list[_Order] = []
        self._lock = threading.Lock()

    def fail(self, pattern: str, *, num: int, fault: Fault = "503") -> None:
        """Fail the next `num` requests whose "METHOD path?query" matches a pattern.

        "cut" ends the connection before an answer, "cut within" halfway through one.
        """
        with self._lock:
            self._orders.append(_Order(re.compile(pattern), fault, num))

    def mend(self) -> None:
        """Stop all faults."""
        with self._lock:
            self._orders.clear()

    def taken(self) -> list[str]:
        """Return the requests since the last call, each as "METHOD path?query"."""
        with self._lock:
            requests, self._requests = self._requests, []
        return requests

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        fault = self._note(environ)
        self._wait()
        if fault is None:
            return self._store(environ, start_response)
        # Unread, a body would be taken for the next request of this connection.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if fault == "503":
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [_SLOW_DOWN]
        return _cut(environ, start_response, within=fault == "cut within")

    def _wait(self) -> None:
        with self._lock:
            self._num_waiting += 1
            self.most_at_once = max(self.most_at_once, self._num_waiting)
        time.sleep(self.latency_s)
        with self._lock:
            self._num_waiting -= 1

    def _note(self, environ: WSGIEnvironment) -> Fault | None:
        query = environ.get("QUERY_STRING")
        place = environ["PATH_INFO"] + (f"?{query}" if query else "")
        request = f"{environ['REQUEST_METHOD']} {place}"
        with self._lock:
            self._requests.append(request)
            for order in self._orders:
                if order.num_left and order.pattern.search(request):
                    order.num_left -= 1
                    return order.fault
        return None


def _cut(
    environ: WSGIEnvironment, start_response: StartResponse, *, within: bool
) -> Iterator[bytes]:
    connection: socket.socket = environ["werkzeug.socket"]
    if within:
        start_response("200 OK", [("Content-Length", "100")])
        yield b"x" * 50
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@contextlib.contextmanager
def s3_server() -> Iterator[Line]:
    """Serve an empty `BUCKET` on a free port, and point the environment at it."""
    line = Line(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, line, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    settled = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key-of-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-tests",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with mock.patch.dict(os.environ, settled):
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
                os.environ.pop(name, None)
            # The store is this process's: it may hold what a test before left.
            urlopen(f"{settled['AWS_ENDPOINT_URL']}/moto-api/reset", b"").close()
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            line.taken()
            yield line
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def checked_credentials() -> Iterator[dict[str, str]]:
    """Make the store check credentials, and yield an authorised user's environment."""
    iam = boto3.client("iam", region_name="us-east-1")
    iam.create_user(UserName="reader")
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": allowed})
    iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=policy)
    with mock.patch.object(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0):
        yield {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }
