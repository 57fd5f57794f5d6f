"""The store in S3, or in anything that speaks it; with s3_client.py the only code that imports boto3.

`put_new` is a PUT with `If-None-Match: *`. Credentials, region and proxies come from the environment, as for every AWS
tool, and never travel with the store. What is read through `local` is kept in a folder of this machine: names are
written once, so a copy never goes stale. The folder is kept below $UNCLIP_CACHE_GB, by what was used longest ago.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any

from botocore import exceptions as boto
from tenacity import retry, retry_if_exception, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from infra.documents import canonical, digest
from infra.errors import NotFound, Refused
from infra.store.base import RENEW_S, Entry, check_name
from infra.store.cache import Parts, count_fetched, writing_copies
from infra.store.local import same_bytes, scratch_folder, sweep
from infra.store.s3_client import BROKEN, client_for, error_code, explain_errors
from infra.store.s3_listing import list_objects

# S3 takes at most 5 GiB in one PUT. What is larger goes in parts.
_SINGLE = 4 << 30
_PART = 256 << 20
_CHUNK = 1 << 20
PATIENCE_S, ATTEMPTS = 20.0, 8
"""Seconds until a connection or (three times as long) an answer is given up, and how often each request is tried."""
ABANDONED_S = 86_400
"""An upload in parts that was begun so long ago and is not finished is nobody's any more."""
_MARKER = "store.json"
_CONFLICT = "ConditionalRequestConflict"

# Reading a body can break after botocore's own retries are done with.
_again = retry(
    retry=retry_if_exception_type(BROKEN),
    stop=stop_after_attempt(6),
    wait=wait_random_exponential(multiplier=0.2, max=10),
    reraise=True,
)

# S3's advice to one of two writers of a name whose requests meet: wait and begin again, an upload in parts from its
# first part. By then the name is mostly taken.
_settled = retry(
    retry=retry_if_exception(lambda error: isinstance(error, boto.ClientError) and error_code(error) == _CONFLICT),
    stop=stop_after_attempt(8),
    wait=wait_random_exponential(multiplier=0.2, max=10),
    reraise=True,
)


@dataclass(frozen=True)
class S3Store:
    """A store under `s3://bucket/prefix`. endpoint: None for Amazon's; cache: None for the user's cache folder."""

    bucket: str
    prefix: str
    endpoint: str | None = None
    cache: Path | None = None

    @classmethod
    def open(cls, uri: str, *, create: bool = True, cache: Path | None = None, endpoint: str | None = None) -> S3Store:
        """Checks within seconds that the bucket answers, and (create) that a name there can be written just once."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise Refused(
                f"store {uri!r}: {bucket!r} is no name of a bucket (3 to 63 small letters, digits, hyphens and dots). "
                "Write s3://bucket or s3://bucket/prefix."
            )
        if prefix:
            check_name(prefix)
        store = cls(bucket, prefix, endpoint or os.environ.get("AWS_ENDPOINT_URL") or None, cache)
        store.check(create)
        return store

    @property
    def distant(self) -> bool:
        return True

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def check(self, create: bool) -> None:
        """Refused if there is no such bucket, we may not use it, or its server does not know If-None-Match."""
        with self._speaking():
            client = client_for(self.endpoint, 3, 3)  # little patience: a person waits
            client.list_objects_v2(Bucket=self.bucket, Prefix=self._key(""), MaxKeys=1)
        if not create:
            return
        marker = canonical({"schema_version": 1})
        with self._speaking(_MARKER):
            # Two puts of one name: at the latest the second must be turned down.
            if self._put(client, _MARKER, marker) and self._put(client, _MARKER, marker):
                raise Refused(
                    f"store {self.uri}: its server ignores If-None-Match, so that two runs could overwrite each "
                    "other's results. Use a server with conditional writes (Amazon S3, Ceph, MinIO and others)."
                )
        self._abandon(client)
        with writing_copies(self._tmp):
            self._tmp.mkdir(parents=True, exist_ok=True)
        sweep(self._tmp)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        key = self._key(check_name(name))
        if length == 0:
            return b""
        end = "" if length is None else start + length - 1
        span = {"Range": f"bytes={start}-{end}"} if start or length is not None else {}

        @_again
        def read() -> bytes:
            return self._client.get_object(Bucket=self.bucket, Key=key, **span)["Body"].read()

        with self._speaking(name):
            try:
                return read()
            except boto.ClientError as error:
                if error_code(error) == "InvalidRange":  # begins at or behind the end
                    return b""
                raise

    def part(self, name: str, start: int, length: int, within: tuple[int, int] | None = None) -> bytes:
        parts = Parts(self._copies, check_name(name))
        return parts.part(start, length, *(within or (start, length)), partial(self.get, name), self.scratch)

    def put_new(self, name: str, data: bytes | Path) -> bool:
        check_name(name)
        with self._speaking(name):
            if isinstance(data, Path) and data.stat().st_size > _SINGLE:
                put = self._put_parts(name, data)
            else:
                put = self._put(self._client, name, data)
        # Turned down: by another's bytes, or by our own, if the first answer to our PUT was lost.
        return put or self._renewed(name, self._same(name, data))

    def list(self, prefix: str) -> Iterator[Entry]:
        if folder := prefix.rpartition("/")[0]:
            check_name(folder)
        cut = len(self._key(""))
        with self._speaking(prefix):
            for found in list_objects(self._client, self.bucket, self._key(prefix)):
                yield Entry(found["Key"][cut:], found["Size"], found["LastModified"].astimezone(UTC))

    def local(self, name: str) -> Path:
        path = self._copies / check_name(name)
        with suppress(FileNotFoundError):
            os.utime(path)  # used just now, which `trim` goes by
            return path

        @_again
        def fetch() -> None:
            found = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
            with self.scratch() as folder:  # which `sweep` finds if this process is killed
                copy = folder / "copy"
                with open(copy, "wb") as file:
                    for chunk in found["Body"].iter_chunks(_CHUNK):
                        file.write(chunk)
                os.chmod(copy, 0o444)
                os.replace(copy, path)  # whole or not at all

        with self._speaking(name), writing_copies(self._copies):
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch()
        count_fetched(self._copies, path.stat().st_size)
        return path

    def exists(self, name: str) -> bool:
        with self._speaking(name):
            try:
                self._client.head_object(Bucket=self.bucket, Key=self._key(check_name(name)))
            except boto.ClientError as error:
                if error_code(error) in ("404", "NoSuchKey", "NotFound"):
                    return False
                raise
        return True

    def delete(self, name: str) -> None:
        with self._speaking(name):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(check_name(name)))
        Parts(self._copies, name).delete()

    def scratch(self) -> AbstractContextManager[Path]:
        return scratch_folder(self._tmp)

    @property
    def _client(self) -> Any:
        return client_for(self.endpoint, PATIENCE_S, ATTEMPTS)

    @property
    def _copies(self) -> Path:
        folder = self.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip" / "s3"
        return folder / digest(canonical([self.endpoint, self.bucket, self.prefix]))[:16]

    @property
    def _tmp(self) -> Path:
        return self._copies / "tmp"

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @_settled
    def _put(self, client: Any, name: str, data: bytes | Path) -> bool:
        """One conditional PUT; False if the name is taken."""
        try:
            if isinstance(data, bytes):
                client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
            else:
                with open(data, "rb") as file:
                    client.put_object(Bucket=self.bucket, Key=self._key(name), Body=file, IfNoneMatch="*")
            return True
        except boto.ClientError as error:
            if error_code(error) in ("PreconditionFailed", "412"):
                return False
            raise

    @_settled
    def _put_parts(self, name: str, path: Path) -> bool:
        """As `_put`, for a file too large for one PUT.

        A server may know If-None-Match in whole PUTs (which `check` tries) and ignore it where parts are joined. Then
        the last of two concurrent writers wins, and it does no harm: an object's name is its digest, and a checkpoint's
        has the number of a lease, which one writer holds.
        """
        if self.exists(name):
            return False
        place = {"Bucket": self.bucket, "Key": self._key(name)}
        upload = self._client.create_multipart_upload(**place)["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            with open(path, "rb") as file:
                while chunk := file.read(_PART):
                    number = len(parts) + 1
                    part = self._client.upload_part(**place, UploadId=upload, PartNumber=number, Body=chunk)
                    parts.append({"PartNumber": number, "ETag": part["ETag"]})
            self._client.complete_multipart_upload(
                **place, UploadId=upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
            return True
        except BaseException as error:
            with suppress(boto.BotoCoreError, boto.ClientError):
                self._client.abort_multipart_upload(**place, UploadId=upload)
            if isinstance(error, boto.ClientError):
                if error_code(error) in ("PreconditionFailed", "412"):
                    return False
                if error_code(error) == "NoSuchUpload" and self.exists(name):  # joined, and the answer to that was lost
                    return False
            raise

    def _abandon(self, client: Any) -> None:
        """Gives up uploads in parts that killed writers left: they have no name, and cost what their parts take.

        What the server does not let us list is left to the bucket's own rule (AbortIncompleteMultipartUpload).
        """
        begun = datetime.now(UTC) - timedelta(seconds=ABANDONED_S)
        with suppress(boto.ClientError, boto.BotoCoreError):
            listing = client.get_paginator("list_multipart_uploads")
            for page in listing.paginate(Bucket=self.bucket, Prefix=self._key("")):
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"] < begun:
                        place = {"Bucket": self.bucket, "Key": upload["Key"]}
                        client.abort_multipart_upload(**place, UploadId=upload["UploadId"])

    def _renewed(self, name: str, same: bool) -> bool:
        """Dates an object anew if the bytes put were its own and are not young: a copy onto itself, in the server."""
        place = {"Bucket": self.bucket, "Key": self._key(name)}
        with self._speaking(name):
            try:
                if same and _age(self._client.head_object(**place)) > RENEW_S:
                    self._client.copy(place, **place, ExtraArgs={"MetadataDirective": "REPLACE"})
            except boto.ClientError as error:
                if error_code(error) not in ("404", "NoSuchKey", "NotFound"):  # removed since: `commit` looks again
                    raise
        return same

    def _same(self, name: str, data: bytes | Path) -> bool:
        try:
            if isinstance(data, bytes):
                return self.get(name) == data
            return same_bytes(self.local(name), data)
        except NotFound:  # deleted since
            return False

    def _speaking(self, name: str = "") -> AbstractContextManager[None]:
        return explain_errors(self.uri, self.endpoint, name)


def _age(head: dict[str, Any]) -> float:
    """Seconds since an object was put, by the server's own clock."""
    now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
    return (now - head["LastModified"]).total_seconds()
