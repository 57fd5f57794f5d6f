"""The S3 client of a process, and what a server's errors mean to a person."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from typing import Any

import boto3
import botocore.session
from botocore import exceptions as boto
from botocore.config import Config
from botocore.utils import parse_timestamp

from infra.errors import NotFound, Refused, Unavailable

BROKEN = (boto.ReadTimeoutError, boto.ResponseStreamingError, boto.IncompleteReadError, boto.ConnectionClosedError)
UNREACHABLE = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError, boto.SSLError)


@contextmanager
def explain_errors(uri: str, endpoint: str | None, name: str = "") -> Iterator[None]:
    """Turns what the server of a store says into what the person can do about it.

    name: what was asked for, "" where that is the store itself. Raises NotFound, Unavailable or Refused.
    """
    where = f"store {uri}" + (f" at {endpoint}" if endpoint else "")
    try:
        yield
    except (*UNREACHABLE, *BROKEN) as error:
        told = f"{where} does not answer ({error}). Is its server running, and AWS_ENDPOINT_URL right?"
        raise (Unavailable if name else Refused)(told) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound) as error:
        raise Refused(f"{where}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.") from error
    except Refused:
        raise
    except ValueError as error:  # an endpoint or a region that is none
        raise Refused(f"{where}: {error}. Check the bucket's name, AWS_ENDPOINT_URL and AWS_REGION.") from error
    except boto.ClientError as error:
        match error_code(error):
            case "NoSuchKey" | "404" | "NotFound" if name:
                raise NotFound(name, uri) from error
            case "NoSuchBucket":
                raise Refused(f"{where}: there is no such bucket. Create it, or name another.") from error
            case "AccessDenied" | "403" | "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "ExpiredToken":
                raise Refused(
                    f"{where}: access denied ({error_code(error)}{f' for {name}' if name else ''}). It needs listing, "
                    "reading and writing; check the credentials and the bucket's policy."
                ) from error
            case "ConditionalRequestConflict":
                raise Refused(f"{where}: others kept writing {name}; run again", code=5) from error
            case "MethodNotAllowed" | "NotImplemented":
                raise Refused(f"{where}: its server cannot do this ({error}).") from error
        told = error.response.get("ResponseMetadata", {})
        # Of an answer that is no XML botocore makes a nameless 500, whatever its status was.
        nameless = not name and error_code(error) == "500" and not told.get("RequestId")
        if told.get("HTTPStatusCode") in (500, 502, 503, 504) and not nameless:
            raise Unavailable(
                f"{where}: its server fails just now ({error}) What is done stays done; run again later."
            ) from error
        hint = "" if name else " Does an S3 server listen there, and are AWS_ENDPOINT_URL and AWS_REGION right?"
        raise Refused(f"{where}: {error}.{hint}", code=5 if name else 2) from error
    except boto.BotoCoreError as error:  # such as an answer that is no XML
        raise Refused(
            f"{where} answers, and not as an S3 server does ({type(error).__name__}). Is AWS_ENDPOINT_URL right?",
            code=5 if name else 2,
        ) from error


@cache
def client_for(endpoint: str | None, patience_s: float, attempts: int) -> Any:
    """One client a process (they are thread-safe). Checksums only on demand: not every server knows the new ones."""
    core = botocore.session.get_session()
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
    session = boto3.session.Session(botocore_session=core)
    return session.client(
        "s3",
        endpoint_url=endpoint,
        region_name=session.region_name or "us-east-1",
        config=Config(
            connect_timeout=min(patience_s, 5),
            read_timeout=patience_s * 3,
            retries={"mode": "standard", "total_max_attempts": attempts},  # with jitter
            max_pool_connections=32,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if endpoint else "auto"},
        ),
    )


def _time(said: Any) -> datetime:
    """What botocore would make of a time, without dateutil's guessing, which takes two thirds of a listing."""
    if isinstance(said, str) and said.endswith("Z"):
        with suppress(ValueError):
            return datetime.fromisoformat(said)
    return parse_timestamp(said)


def error_code(error: boto.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
