"""Invoking functions: boto3's Lambda client, against AWS or against the emulator's endpoint.

Events are asynchronous, so what comes back is only whether the platform took them; they arrive at
least once. What a function does, and whether it ever starts, is seen elsewhere.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import tenacity

from fault.errors import InputError, PlatformUnavailable
from p2p.transport.hosts import is_loopback

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient

ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL_LAMBDA"
"""boto3's own; the emulator sets it for its functions."""
EVALUATION_SUFFIX = "-evaluate"
"""The function that evaluates is named like the one that trains, and this."""
WORKER_SUFFIX = "-worker"
"""And the function that computes parts of a shard for a peer."""
LOOK_SUFFIX = "-look"
"""And the one that looks at a job before there is a run."""
CONNECT_SECONDS = 3.0
READ_SECONDS = 10.0
_PASSING = frozenset(
    {
        "EC2ThrottledException",
        "ServiceException",
        "ServiceUnavailableException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
"""Answers that may be others in a moment."""


class Platform:
    """One function, by its name. Safe to use from several threads."""

    def __init__(self, function: str, endpoint: str = "", patience_seconds: float = 20.0) -> None:
        """`endpoint` is an emulator's URL, on loopback; empty means AWS, or what the environment
        says (`AWS_ENDPOINT_URL_LAMBDA`, as in a function that an emulator runs).

        Nothing is sent, and boto3 is not loaded, before the first `invoke`.
        """
        endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE, "")
        if endpoint and not _is_loopback(endpoint):
            raise InputError(f"{endpoint} is no emulator: it must be an http:// URL on loopback")
        self.function = function
        self.endpoint = endpoint
        self.patience_seconds = patience_seconds
        self._client: LambdaClient | None = None
        self._lock = threading.Lock()

    def invoke(self, payload: Mapping[str, Any]) -> None:
        """Hands over one asynchronous event.

        Throttling and failing connections are retried for `patience_seconds`; an event whose
        answer got lost may so arrive twice. Raises PlatformUnavailable.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        body = json.dumps(payload).encode()
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            # no jitter: it would draw from the generator that a job's `random` seeds and uses
            wait=tenacity.wait_exponential(multiplier=0.1, max=2.0),
            stop=tenacity.stop_after_delay(self.patience_seconds),
            reraise=True,
        )
        try:
            attempts(self._send, body)
        except ClientError as error:
            reason = error.response.get("Error", {})
            raise PlatformUnavailable(
                f"function {self.function!r} cannot be invoked{self._where()}: "
                f"{reason.get('Code', '?')}: {reason.get('Message', '')}"
            ) from error
        except BotoCoreError as error:
            raise PlatformUnavailable(
                f"function {self.function!r} cannot be invoked{self._where()}: {error}"
            ) from error

    def _send(self, body: bytes) -> None:
        client = self._connected()
        client.invoke(FunctionName=self.function, InvocationType="Event", Payload=body)

    def _where(self) -> str:
        return f" at {self.endpoint}" if self.endpoint else ""

    def _connected(self) -> LambdaClient:
        with self._lock:
            if self._client is None:
                self._client = _client(self.endpoint)
            return self._client


def _client(endpoint: str) -> LambdaClient:
    import boto3
    from botocore.config import Config

    timing = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"total_max_attempts": 1},  # what is worth a retry is decided here
    )
    # the default session is not safe with threads
    session = boto3.session.Session()
    if not endpoint:
        return session.client("lambda", config=timing)
    return session.client(
        "lambda",
        endpoint_url=endpoint,
        region_name=session.region_name or "us-east-1",
        # never the user's own: an emulator asks for none, and no proxy leads to loopback
        aws_access_key_id="emulator",
        aws_secret_access_key="emulator",
        config=timing.merge(Config(proxies={})),
    )


def _may_pass(error: BaseException) -> bool:
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return error.response.get("Error", {}).get("Code") in _PASSING or status >= 500
    # refused or slow to connect, and whatever breaks later
    return isinstance(error, ConnectionError | HTTPClientError)


def _is_loopback(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
    except ValueError:
        return False
    return parts.scheme == "http" and is_loopback(parts.hostname or "")
