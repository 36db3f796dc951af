"""S3 and what speaks like it: which server, how often a request is repeated, what its errors mean to the user.

Credentials come from where AWS's own tools find them: variables, profiles, roles. No setting of PistoSeg holds one.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pistoseg.errors import PistoSegError, RefusedError, UnavailableError
from pistoseg.redaction import HIDDEN, first_line

if TYPE_CHECKING:
    from pistoseg.config import StorageConfig

ANONYMOUS = "PISTOSEG_S3_ANONYMOUS"
ADDRESSING = "PISTOSEG_S3_ADDRESSING"
RETRIES = 16
"""Tries of a request. s3fs waits 0.1 s after the first, 1.7 times longer each time, 15 s at the most: 2 minutes."""
ARROW_RETRIES = 12
"""Tries of a request of Ray Train's checkpoints: AWS's SDK waits up to 20 s, 90 s together on average."""
CONNECT_S, READ_S = 10, 60
SAY_EVERY_S = 20.0
BATCH = 1000
"""Keys that one request deletes."""
TRANSIENT_CODES = {
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "OperationAborted",
    "ConditionalRequestConflict",
    "429",
    "500",
    "502",
    "503",
    "504",
}
TRANSIENT_ERRORS = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ReadTimeoutError",
    "ConnectionResetError",
    "ConnectionRefusedError",
    "ServerDisconnectedError",
    "ClientOSError",
    "ClientConnectorError",
    "TimeoutError",
    "ConnectionError",
    # A connection that broke within an answer, which s3fs has tried again, too.
    "HTTPClientError",
    "ClientPayloadError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseStreamingError",
    "ResponseParserError",
}
WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity"}
REFUSED = {"AccessDenied", "AllAccessDisabled", "403", "Forbidden"}
NO_KEYS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}
NO_TLS = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")
"""In what an `SSLError` says: trying again does not help. What else it says may be a connection that broke."""
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
SKEWED = "RequestTimeTooSkewed"
NO_REASON = "400"
"""The answer to a HEAD has no body, and so no code: this is how AWS refuses one with an expired token."""
ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307"}

_log = logging.getLogger("pistoseg.storage")
_forwarded: dict[str, str] = {}
_said = -SAY_EVERY_S


@dataclass(frozen=True)
class S3Settings:
    """How S3 is reached.

    Args:
        endpoint: URL of the server; None: AWS, or what the profile says.
        region: of the bucket; None: what the profile says.
        profile: of the credentials; None: the default.
        anonymous: whether requests are not signed.
        addressing: `path`, `virtual`, or `auto`: path where there is an endpoint.
    """

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    addressing: str = "auto"


def settings() -> S3Settings:
    """What the environment says."""
    get = os.environ.get
    return S3Settings(
        endpoint=get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL") or None,
        region=get("AWS_REGION") or get("AWS_DEFAULT_REGION") or None,
        profile=get("AWS_PROFILE") or get("AWS_DEFAULT_PROFILE") or None,
        anonymous=get(ANONYMOUS, "").lower() in ("1", "true", "yes"),
        addressing=get(ADDRESSING) or "auto",
    )


def use(config: StorageConfig) -> None:
    """Put a config's settings into the environment, for every library of this process and of Ray's workers."""
    given = {
        "AWS_ENDPOINT_URL_S3": config.endpoint,
        "AWS_REGION": config.region,
        "AWS_DEFAULT_REGION": config.region,
        "AWS_PROFILE": config.profile,
        ANONYMOUS: "1" if config.anonymous else None,
        ADDRESSING: None if config.addressing == "auto" else config.addressing,
    }
    for name, value in given.items():
        if value is not None and os.environ.get(name) != value:
            os.environ[name] = _forwarded[name] = value


def forwarded() -> dict[str, str]:
    """Variables that a config set and that workers on other nodes need; none of them is a secret."""
    return dict(_forwarded)


def filesystem() -> Any:
    """s3fs with these settings. Listings are not cached: other jobs write to the same folders."""
    import fsspec
    from s3fs.core import set_custom_error_handler

    now = settings()
    client: dict[str, Any] = {"region_name": now.region} if now.region else {}
    config: dict[str, Any] = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "max_pool_connections": 64}
    config["retries"] = {"mode": "standard", "max_attempts": 2}  # s3fs repeats as well, and for longer
    if now.addressing != "auto":
        config["s3"] = {"addressing_style": now.addressing}
    options: dict[str, Any] = {"client_kwargs": client, "config_kwargs": config, "use_listings_cache": False}
    if now.endpoint:
        options["endpoint_url"] = now.endpoint
    if now.profile:
        options["profile"] = now.profile
    try:
        backend = fsspec.filesystem("s3", anon=now.anonymous, **options)
    except Exception as error:
        raise explain(error, "s3://") or error from error
    backend.retries = RETRIES
    set_custom_error_handler(is_transient)
    return backend


def arrow_filesystem() -> Any:
    """pyarrow's S3 with the same settings, as Ray Train wants it; it carries no credentials but finds them itself."""
    import pyarrow.fs as arrow_fs

    now = settings()
    endpoint, region = now.endpoint or _of_profile("endpoint_url"), now.region or _of_profile("region")
    if now.addressing == "path" and not endpoint:  # pyarrow knows path style for endpoints only
        endpoint = f"https://s3.{region}.amazonaws.com" if region else "https://s3.amazonaws.com"
    options: dict[str, Any] = {}
    if endpoint:
        scheme, separator, host = endpoint.rstrip("/").partition("://")
        options |= {"endpoint_override": host, "scheme": scheme} if separator else {"endpoint_override": scheme}
    if region:
        options["region"] = region
    if now.anonymous:
        options["anonymous"] = True
    if bundle := os.environ.get("AWS_CA_BUNDLE") or _of_profile("ca_bundle"):
        options["tls_ca_file_path"] = bundle
    return arrow_fs.S3FileSystem(
        force_virtual_addressing=now.addressing == "virtual",
        connect_timeout=CONNECT_S,
        request_timeout=READ_S,
        retry_strategy=arrow_fs.AwsStandardS3RetryStrategy(max_attempts=ARROW_RETRIES),
        **options,
    )


def _of_profile(key: str) -> str | None:
    """What the profile's section of AWS's config file says."""
    import botocore.exceptions
    import botocore.session

    try:
        value = botocore.session.Session(profile=settings().profile).get_scoped_config().get(key)
    except botocore.exceptions.ProfileNotFound as error:
        raise explain(error, "s3://") or error from error
    return str(value) if value else None


def split(path: str) -> tuple[str, str]:
    """Bucket and key of `bucket/key`."""
    bucket, _, key = path.partition("/")
    return bucket, key


def check_bucket(uri: str) -> None:
    """Refuse a URI that does not begin with a bucket's name; what may be a key is not shown."""
    protocol, _, path = uri.partition("://")
    bucket = split(path)[0]
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise PistoSegError(
            "holds credentials or a port before its bucket",
            file=f"{protocol}://{HIDDEN}",
            remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and for a server AWS_ENDPOINT_URL",
        )
    if not bucket.startswith("arn:") and not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", bucket):
        raise PistoSegError(f"{bucket!r} is no bucket's name", file=uri, remedy=f"write {protocol}://BUCKET/KEY")


def pages(backend: Any, path: str, delimiter: str = "") -> Iterator[dict[str, Any]]:
    """What S3 says of the keys below a folder, a thousand at a time and in the order of the keys.

    Args:
        backend: s3fs.
        path: `bucket/folder`.
        delimiter: `/` for the folder's own children only.
    """
    bucket, key = split(path.rstrip("/"))
    request = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "Delimiter": delimiter}
    while True:
        page = backend.call_s3("list_objects_v2", **request)
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def remove_below(backend: Any, path: str) -> None:
    """Delete every key below a folder; those that the server is too busy to delete are tried again."""
    from botocore.exceptions import ClientError

    bucket, key = split(path.rstrip("/"))
    in_vain = 0
    while True:
        # Listed anew after each batch: a token may not survive the keys that it stands for.
        page = backend.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=BATCH)
        keys = [{"Key": item["Key"]} for item in page.get("Contents", [])]
        if not keys:
            return
        answer = backend.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        problems = [ClientError({"Error": item}, "DeleteObjects") for item in answer.get("Errors", [])]
        for problem in problems:
            if not is_transient(problem):
                what = problem.response["Error"]
                raise PermissionError(f"{what.get('Code')}: {what.get('Message')} ({what.get('Key')})")
        in_vain = in_vain + 1 if len(problems) == len(keys) else 0
        if in_vain == RETRIES:
            raise problems[0]
        if problems:
            time.sleep(min(0.1 * 1.7**in_vain, 15))  # as s3fs


def code_of(error: BaseException | None) -> str:
    """S3's code in an error or in what it was translated from; empty where there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        response = getattr(error, "response", None)
        if isinstance(response, dict) and (code := response.get("Error", {}).get("Code")):
            return str(code)
        error = error.__cause__ or error.__context__
    return ""


def is_precondition(error: BaseException) -> bool:
    """Whether a conditional put found the key taken."""
    return code_of(error) in ("PreconditionFailed", "412")


def is_transient(error: BaseException) -> bool:
    """Whether to try again: the server is busy, away, or the connection broke. Says so from time to time."""
    global _said
    transient = code_of(error) in TRANSIENT_CODES or bool(_names(error) & TRANSIENT_ERRORS)
    transient = transient and not _is_without_tls(error)
    if transient and time.monotonic() - _said >= SAY_EVERY_S:
        _said = time.monotonic()
        _log.warning("object storage does not answer (%s), trying again", code_of(error) or type(error).__name__)
    return transient


def keeps_out(error: BaseException) -> bool:
    """Whether a storage takes nothing from this machine, which time does not mend: no keys, no rights or no bucket."""
    no_keys = _names(error) & {"NoCredentialsError", "PartialCredentialsError"}
    return bool(no_keys) or code_of(error) in WRONG_KEYS | REFUSED | ELSEWHERE | {"NoSuchBucket"}


def explain(error: BaseException, uri: str) -> PistoSegError | None:
    """An error of a storage as one that says what to do; None where it is of another kind."""
    code, names = code_of(error), _names(error)
    server = settings().endpoint or "AWS"
    kind: type[PistoSegError] = UnavailableError
    if names & NO_KEYS or "Unable to locate credentials" in str(error):
        reason, remedy = "there are no credentials for it", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        remedy += f"AWS_PROFILE; for a public bucket {ANONYMOUS}=1 or storage.anonymous=true"
    elif "ProfileNotFound" in names:
        reason, remedy = f"the profile {settings().profile!r} is not in AWS's config file", "set AWS_PROFILE"
    elif setting := _wrong_setting(error):
        what, remedy = setting
        reason = f"{what} can't be used"
    elif _is_without_tls(error):
        reason = f"{server} has no certificate that this machine trusts ({first_line(error)})"
        remedy = "set AWS_CA_BUNDLE to the file of its authority; one without TLS needs an address with http://"
    elif code in WRONG_KEYS:
        reason = f"{server} refuses the access key ({code})"
        remedy = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and AWS_ENDPOINT_URL"
    elif code in EXPIRED:
        reason, remedy = f"the credentials have expired ({code})", "get new ones and run the same command again"
    elif code == SKEWED:
        reason = f"{server} refuses requests of another time than its own: this machine's clock is wrong ({code})"
        remedy = "set the clock (NTP) and run the same command again"
    elif code == NO_REASON:
        reason = f"{server} refuses the request without a reason ({code}): mostly credentials that have expired"
        remedy = "get new ones and run the same command again; if that does not help, check AWS_REGION"
    elif code == "NoSuchBucket":
        bucket = uri.split("://", 1)[-1].split("/")[0]
        reason, remedy = f"there is no bucket {bucket!r} at {server}", "check its name, AWS_ENDPOINT_URL and AWS_REGION"
        kind = PistoSegError  # others may be readable: so here and below
    elif code in ELSEWHERE:
        reason, remedy = f"the bucket is in another region ({code})", "set AWS_REGION or storage.region to the bucket's"
        kind = PistoSegError
    elif code in REFUSED or isinstance(error, PermissionError):
        reason = f"{server} refuses access ({code or error})"
        remedy = "check the access key, and its rights to list, read and write there"
        kind = RefusedError
    elif code in TRANSIENT_CODES or names & TRANSIENT_ERRORS:
        reason = f"{server} does not answer ({code or first_line(error)}), tried {RETRIES} times"
        remedy = "check AWS_ENDPOINT_URL and the network; the same command goes on where this one stopped"
    else:
        return None
    return kind(reason, file=uri, remedy=remedy)


def _wrong_setting(error: BaseException) -> tuple[str, str] | None:
    """A setting that botocore refuses, which it does when it is first used, and the remedy."""
    names = _names(error)
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
        remedy = "give the server's address with http:// or https://"
        return _source("endpoint_url", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), remedy
    if "InvalidRegionError" in names:
        return _source("region", "AWS_REGION", "AWS_DEFAULT_REGION"), "give the region's name, e.g. eu-central-1"
    if "InvalidS3AddressingStyleError" in names:
        return _source("addressing_style", ADDRESSING), "give path, virtual or auto"
    return None


def _source(key: str, *variables: str) -> str:
    """Where a setting comes from: a variable with its value, else the profile."""
    name = next((name for name in variables if os.environ.get(name)), None)
    if name is None:
        return f"the profile's {key}"
    user, at, rest = os.environ[name].rpartition("@")
    return f"{name}={HIDDEN if user else ''}{at}{rest}"


def _is_without_tls(error: BaseException) -> bool:
    return "SSLError" in _names(error) and any(text in str(error) for text in NO_TLS)


def _names(error: BaseException) -> set[str]:
    """Names of an error's classes: botocore, aiohttp and fsspec have their own, none of which is worth an import."""
    return {kind.__name__ for kind in type(error).__mro__}
