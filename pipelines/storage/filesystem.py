"""Open files wherever they lie: on a path, in a bucket, anywhere that fsspec opens.

A place is a path or an address. `file://`, `s3://`, `gs://`, `abfs://` and `hdfs://`
are opened by pyarrow, any other scheme by the fsspec package that knows it. S3 takes
its settings from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or
AWS_DEFAULT_REGION, AWS_CA_BUNDLE, the credentials and AWS_PROFILE; an address may say
otherwise, as `s3://bucket/folder?region=eu-west-1` does.
"""

from __future__ import annotations

import functools
import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow.fs as pafs

from pipelines.storage.redaction import error_summary, without_credentials
from pipelines.storage.retry import retrying

# How often pyarrow's S3 client makes a request before it reports a failure; see
# `retry` for what that comes to.
_CLIENT_TRIES = 3
_OF_ARROW = frozenset({"file", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"})
_S3_TEXTS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
_S3_SWITCHES = ("anonymous", "force_virtual_addressing")
_IDENTITY = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
)
_BUCKET = re.compile(r"[\w.-]+")
# pyarrow would wait for Google's store for 15 minutes at each request; we try again.
_GCS_PATIENCE_S = 10


def absolute(place: str) -> str:
    """Make a local path absolute, with `~` as the shell reads it; addresses stay.

    A shell leaves the `~` of `--storage=~/runs` alone.
    """
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def open_filesystem(address: str) -> tuple[pafs.FileSystem, str]:
    """Open the filesystem of a folder or a file; return it and the path.

    Raises ValueError, without any credentials, where the address can't be read, its
    scheme is not known or the package for it is missing. An S3 bucket whose region
    nothing names is asked for it once, which raises as `retrying` does.
    """
    scheme, separator, _ = address.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), os.path.expanduser(address)
    if scheme == "s3":
        return _open_s3(address)
    if scheme not in _OF_ARROW:
        return _open_fsspec(address, scheme=scheme)
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in address:
        option = f"retry_limit_seconds={_GCS_PATIENCE_S}"
        address = f"{address}{'&' if '?' in address else '?'}{option}"
    try:
        return pafs.FileSystem.from_uri(address)
    except (OSError, ValueError) as error:
        # The error before holds the address as it came.
        raise _unusable(address, reason=error_summary(error)) from None


def _open_s3(address: str) -> tuple[pafs.FileSystem, str]:
    # Not `from_uri`: its client can't be told how patient to be.
    parts = urlsplit(address)
    user, _, bucket = parts.netloc.rpartition("@")
    if not _BUCKET.fullmatch(bucket):
        reason = "it names no bucket, or a secret with a '/' that is not written %2F"
        raise _unusable(address, reason=reason)
    options = dict(parse_qsl(parts.query))
    unknown = options.keys() - {*_S3_TEXTS, *_S3_SWITCHES}
    if unknown:
        known = ", ".join((*_S3_TEXTS, *_S3_SWITCHES))
        reason = f"its options are {', '.join(sorted(options))}, known are {known}"
        raise _unusable(address, reason=reason)
    key, _, secret = user.partition(":")
    if key:
        options |= {"access_key": unquote(key), "secret_key": unquote(secret)}
    options = _s3_environment() | options
    if not options.keys() & {"region", "endpoint_override"}:
        options["region"] = retrying(
            lambda: pafs.resolve_s3_region(bucket), address=address
        )
    identity = tuple(os.environ.get(name) for name in _IDENTITY)
    filesystem = _s3_client(tuple(sorted(options.items())), identity)
    return filesystem, f"{bucket}{unquote(parts.path)}".rstrip("/")


def _s3_environment() -> dict[str, str]:
    """Return the settings that pyarrow's client does not look up itself."""
    found = {
        "endpoint_override": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        "tls_ca_file_path": ("AWS_CA_BUNDLE",),
    }
    values = {
        option: next(filter(None, map(os.environ.get, names)), None)
        for option, names in found.items()
    }
    return {option: value for option, value in values.items() if value}


# A client takes 35 ms to make, and keeps its connections: a read task's next unit is
# read through the same. It is made anew where the environment names someone else.
@functools.lru_cache(maxsize=16)
def _s3_client(
    options: tuple[tuple[str, str], ...], identity: tuple[str | None, ...]
) -> pafs.S3FileSystem:
    switches = {
        name: value == "true" for name, value in options if name in _S3_SWITCHES
    }
    texts = {name: value for name, value in options if name not in _S3_SWITCHES}
    # Files up to 10 MB are put in one request, larger ones in parts of as much.
    patience = pafs.AwsStandardS3RetryStrategy(max_attempts=_CLIENT_TRIES)
    return pafs.S3FileSystem(
        **texts, **switches, allow_delayed_open=True, retry_strategy=patience
    )


def _open_fsspec(address: str, *, scheme: str) -> tuple[pafs.FileSystem, str]:
    try:
        import fsspec

        filesystem, path = fsspec.url_to_fs(address)
    except ImportError as error:  # its words name the package
        reason = f"{error_summary(error)}; install the package for {scheme}://"
        raise _unusable(address, reason=reason) from None
    except (OSError, ValueError) as error:
        raise _unusable(address, reason=error_summary(error)) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def parent_address(address: str) -> str:
    """Return the address of a folder's parent."""
    if "://" not in address:
        return os.path.dirname(os.path.abspath(address))
    path, mark, options = address.partition("?")
    return f"{path.rstrip('/').rpartition('/')[0]}{mark}{options}"


def _unusable(address: str, *, reason: str) -> ValueError:
    return ValueError(
        "expected a path or an address such as s3://bucket/folder, got "
        f"{without_credentials(address)!r}: {reason}"
    )
