import errno
import hashlib
import json
import os
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import botocore.exceptions
import botocore.parsers
import pytest

from pistoseg import object_store, storage
from pistoseg.config import StorageConfig, load_config
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError
from pistoseg.patches import decode, digest
from pistoseg.patches.source import Rejection

VARIABLES = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"]
VARIABLES += ["AWS_DEFAULT_PROFILE", object_store.ANONYMOUS, object_store.ADDRESSING]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that afterwards it is as before, also where `use` sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(object_store, "_forwarded", {})


def client_error(code, status=400, operation="GetObject"):
    response = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(response, operation)


def translated(code):
    from s3fs.errors import translate_boto_error

    return translate_boto_error(client_error(code))


class Bucket:
    """What s3fs does for a bucket with keys `folder/<number>.png`, made up page by page."""

    def __init__(self, count, below="folder/"):
        self.count, self.below, self.requests = count, below, 0

    def call_s3(self, method, **request):
        assert method == "list_objects_v2"
        assert request["Bucket"] == "bucket"
        assert request["Prefix"] == self.below
        self.requests += 1
        start = int(request.get("ContinuationToken", 0))
        stop = min(start + 1000, self.count)
        keys = [{"Key": f"{self.below}x-{n:07d}[1, 0].png", "Size": n, "ETag": f'"{n}"'} for n in range(start, stop)]
        return {"Contents": keys, "IsTruncated": stop < self.count, "NextContinuationToken": str(stop)}

    def unstrip_protocol(self, path):
        return f"s3://{path}"


def test_keys_are_hashed_with_one_page_in_memory(monkeypatch):
    bucket = Bucket(60_000)
    monkeypatch.setattr(object_store, "filesystem", lambda: bucket)
    tracemalloc.start()
    found = digest.files_digest("s3://bucket/folder")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bucket.requests == 60
    assert peak < 3e6  # a list of them takes 18 MB
    expected = hashlib.sha256(b"[")
    for n in range(60_000):
        expected.update(f'{", " if n else ""}["x-{n:07d}[1, 0].png", {n}, "\\"{n}\\""]'.encode())
    expected.update(b"]")
    assert found == expected.hexdigest()[:16]


def test_the_hash_of_a_listing_is_that_of_its_list(tmp_path):
    for name in ("b [1].png", "a.png", "sub/c.png"):
        storage.write_bytes(str(tmp_path / name), name.encode())
    expected = hashlib.sha256(json.dumps(storage.list_details(str(tmp_path))).encode()).hexdigest()[:16]
    assert digest.files_digest(str(tmp_path)) == expected
    assert digest.files_digest(str(tmp_path / "sub2")) == hashlib.sha256(b"[]").hexdigest()[:16]


def test_all_pages_are_listed(monkeypatch):
    monkeypatch.setattr(object_store, "filesystem", lambda: Bucket(2500))
    listed = storage.list_files("s3://bucket/folder")
    assert len(listed) == 2500
    assert listed[-1] == "s3://bucket/folder/x-0002499[1, 0].png"
    assert storage.list_dir("s3://bucket/folder/") == listed


class Deleting:
    """What s3fs does for a bucket with a key `folder/<number>` for each number, some of which can't be deleted."""

    def __init__(self, problem, keys=5, lasts=1):
        self.keys, self.problem, self.lasts = [f"folder/{number}" for number in range(keys)], problem, lasts

    def call_s3(self, method, **request):
        if method == "list_objects_v2":
            return {"Contents": [{"Key": key} for key in self.keys]}
        stay = [item["Key"] for item in request["Delete"]["Objects"] if self.lasts and item["Key"] < "folder/2"]
        self.lasts = max(0, self.lasts - 1)
        self.keys = stay
        return {"Errors": [{"Key": key, "Code": self.problem, "Message": "m"} for key in stay]}


def test_keys_that_a_busy_server_did_not_delete_are_deleted_again(monkeypatch):
    monkeypatch.setattr(object_store.time, "sleep", lambda seconds: None)
    bucket = Deleting("InternalError", lasts=5)
    monkeypatch.setattr(object_store, "filesystem", lambda: bucket)
    storage.remove_tree("s3://bucket/folder")
    assert bucket.keys == []


@pytest.mark.parametrize(
    ("problem", "kind", "message"),
    [("SlowDown", UnavailableError, "does not answer .SlowDown"), ("AccessDenied", RefusedError, "folder/0")],
)
def test_keys_that_can_not_be_deleted_are_an_outage_or_a_refusal(monkeypatch, problem, kind, message):
    waited = []
    monkeypatch.setattr(object_store.time, "sleep", waited.append)
    monkeypatch.setattr(object_store, "filesystem", lambda: Deleting(problem, lasts=100))
    with pytest.raises(kind, match=message):
        storage.remove_tree("s3://bucket/folder")
    assert len(waited) == (object_store.RETRIES if problem == "SlowDown" else 0)


def test_the_environment_says_how_s3_is_reached(monkeypatch):
    assert object_store.settings() == object_store.S3Settings()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://any:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3:2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv(object_store.ANONYMOUS, "1")
    monkeypatch.setenv(object_store.ADDRESSING, "virtual")
    expected = object_store.S3Settings("http://s3:2", "eu-north-1", "lab", True, "virtual")
    assert object_store.settings() == expected


def test_the_config_goes_before_the_environment_and_on_to_the_workers(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://any:1")
    config = StorageConfig(endpoint="http://s3:2", region="eu-north-1", anonymous=True, addressing="path")
    object_store.use(config)
    assert object_store.settings() == object_store.S3Settings("http://s3:2", "eu-north-1", None, True, "path")
    assert object_store.forwarded()["AWS_ENDPOINT_URL_S3"] == "http://s3:2"
    assert not any("KEY" in name or "TOKEN" in name for name in object_store.forwarded())
    object_store.use(StorageConfig())  # null: the environment
    assert object_store.settings().endpoint == "http://s3:2"


def test_both_clients_get_the_same_server_region_and_style(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.lab:9000/")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv(object_store.ADDRESSING, "virtual")
    ours = object_store.filesystem()
    assert ours.client_kwargs["region_name"] == "eu-north-1"
    assert ours.config_kwargs["s3"] == {"addressing_style": "virtual"}
    assert ours.endpoint_url == "http://s3.lab:9000/"
    arrow = storage.arrow_filesystem("s3://bucket/a [1]")
    assert arrow[1] == "bucket/a [1]"
    options = arrow[0].__reduce__()[1][0]
    assert (options["endpoint_override"], options["scheme"]) == ("s3.lab:9000", "http")
    assert (options["region"], options["force_virtual_addressing"]) == ("eu-north-1", True)
    assert not options["access_key"]


def test_a_profile_may_name_server_and_region(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / "config").write_text("[profile lab]\nregion = eu-north-1\nendpoint_url = https://s3.lab\n")
    options = storage.arrow_filesystem("s3://bucket/a")[0].__reduce__()[1][0]
    assert (options["endpoint_override"], options["scheme"], options["region"]) == ("s3.lab", "https", "eu-north-1")
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(PistoSegError, match=r"profile 'other' is not in AWS's config file.*AWS_PROFILE"):
        storage.arrow_filesystem("s3://bucket/a")


def test_pyarrow_trusts_whom_awss_tools_trust(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / "config").write_text("[profile lab]\nca_bundle = /etc/lab.pem\n")
    assert storage.arrow_filesystem("s3://bucket/a")[0].__reduce__()[1][0]["tls_ca_file_path"] == "/etc/lab.pem"
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/mine.pem")
    assert storage.arrow_filesystem("s3://bucket/a")[0].__reduce__()[1][0]["tls_ca_file_path"] == "/etc/mine.pem"


def test_a_config_holds_no_keys():
    with pytest.raises(PistoSegError, match="AWS_SECRET_ACCESS_KEY") as caught:
        load_config("demo", overrides=["storage.secret_key=hunter2hunter2"])
    assert "hunter2" not in str(caught.value)
    with pytest.raises(PistoSegError, match="must hold no credentials") as caught:
        load_config("demo", overrides=["storage.endpoint=http://me:hunter2@s3"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://me:hunter2@bucket/x", "s3a://me:hunter2/K7@bucket/x", "s3://me:hunter2"])
def test_a_uri_holds_no_keys(uri):
    with pytest.raises(PistoSegError, match=r"holds credentials.*AWS_SECRET_ACCESS_KEY") as caught:
        storage.exists(uri)
    assert "hunter2" not in str(caught.value)


def test_an_access_point_is_a_bucket():
    arn = "arn:aws:s3:eu-north-1:123456789012:accesspoint/name/x@y"
    assert storage.filesystem(f"s3://{arn}")[1] == arn


@pytest.mark.parametrize(
    "error",
    [
        client_error("SlowDown", 503),
        client_error("InternalError", 500),
        client_error("503", 503),
        translated("ServiceUnavailable"),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
        ConnectionResetError(),
        TimeoutError(),
        aiohttp.ClientPayloadError("Response payload is not completed"),
        botocore.exceptions.HTTPClientError(error=OSError("x")),
        botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        botocore.exceptions.ResponseStreamingError(error="x"),
        botocore.parsers.ResponseParserError("x"),
    ],
)
def test_what_passes_is_tried_again_and_an_outage_where_it_does_not(error):
    assert object_store.is_transient(error)
    with pytest.raises(UnavailableError, match=r"does not answer .*same command goes on"):
        raise object_store.explain(error, "s3://bucket/x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (client_error("InvalidAccessKeyId", 403), r"refuses the access key.*AWS_ACCESS_KEY_ID"),
        (translated("SignatureDoesNotMatch"), r"refuses the access key.*AWS_SECRET_ACCESS_KEY"),
        (translated("AccessDenied"), r"refuses access.*rights to list, read and write"),
        (PermissionError("Forbidden"), r"refuses access"),
        (translated("ExpiredToken"), r"have expired.*get new ones"),
        (translated("RequestTimeTooSkewed"), r"this machine's clock is wrong.*NTP"),
        (translated("NoSuchBucket"), r"no bucket 'bucket' at AWS"),
        (translated("PermanentRedirect"), r"another region.*AWS_REGION"),
        (botocore.exceptions.NoCredentialsError(), r"no credentials.*PISTOSEG_S3_ANONYMOUS=1"),
    ],
)
def test_what_does_not_pass_fails_at_once_with_the_remedy(error, message):
    assert not object_store.is_transient(error)
    with pytest.raises(PistoSegError, match=message) as caught:
        raise object_store.explain(error, "s3://bucket/a [1].png")
    assert caught.value.file == "s3://bucket/a [1].png"


def test_what_holds_for_one_bucket_is_no_reason_to_give_up_the_others():
    for code in ("NoSuchBucket", "PermanentRedirect", "AccessDenied"):
        assert not isinstance(object_store.explain(translated(code), "s3://bucket/x"), UnavailableError)
    for code in ("ExpiredToken", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "400"):
        assert isinstance(object_store.explain(translated(code), "s3://bucket/x"), UnavailableError)


class ExpiredToken(BaseHTTPRequestHandler):
    """AWS's answers to an expired token: a code in the body, which a HEAD has not."""

    def log_message(self, *_):
        pass

    def answer(self, body=b""):
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = answer  # noqa: N815

    def do_GET(self):
        self.answer(b"<Error><Code>ExpiredToken</Code><Message>m</Message></Error>")


@pytest.fixture
def expired(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), ExpiredToken)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("expired")
@pytest.mark.parametrize(
    "ask", [storage.exists, storage.is_dir, storage.info, storage.file_size, storage.read_bytes, storage.list_dir]
)
def test_credentials_that_have_expired_are_named_also_where_the_server_gives_no_reason(ask):
    with pytest.raises(UnavailableError, match=r"credentials.* have expired.*get new ones"):
        ask("s3://bucket/x [1].png")


@pytest.mark.usefixtures("expired")
def test_an_image_is_not_rejected_because_credentials_have_expired():
    with pytest.raises(PistoSegError) as caught:
        decode.read_file("s3://bucket/x.png")
    with pytest.raises(UnavailableError, match="credentials that have expired"):
        Rejection.of(caught.value)


def test_an_image_is_not_rejected_because_its_storage_refuses_it(monkeypatch):
    def refuse(uri):
        raise object_store.explain(translated("AccessDenied"), uri)

    monkeypatch.setattr(storage, "read_bytes", refuse)
    with pytest.raises(UnavailableError, match=r"s3://bucket/x.png: AWS refuses access .AccessDenied"):
        decode.read_file("s3://bucket/x.png", "x.png")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", r"AWS_ENDPOINT_URL=localhost:9000 can't be used.*http://"),
        ("AWS_REGION", "eu_central!", r"AWS_REGION=eu_central! can't be used.*eu-central-1"),
        (object_store.ADDRESSING, "virtuell", r"ADDRESSING=virtuell can't be used.*path, virtual or auto"),
        ("AWS_ENDPOINT_URL_S3", "localhost:9000", r"AWS_ENDPOINT_URL_S3=localhost:9000 can't be used"),
        ("AWS_ENDPOINT_URL", "KEY:pass_word@minio:9000", r"AWS_ENDPOINT_URL=\*\*\*@minio:9000 can't be used"),
    ],
)
def test_a_variable_that_can_not_be_used_is_named(monkeypatch, name, value, message):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    with pytest.raises(PistoSegError, match=message):
        storage.exists("s3://bucket/x")


def test_a_profiles_setting_that_can_not_be_used_is_said_to_be_the_profiles(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / "config").write_text("[profile lab]\nregion = eu_central!\n")
    with pytest.raises(PistoSegError, match="the profile's region can't be used"):
        storage.exists("s3://bucket/x")


@pytest.mark.parametrize("uri", ["s3://bad bucket/x", "s3:///x", "s3://", "s3://buck*/x"])
def test_a_uri_without_a_bucket_is_refused_before_a_server_is_asked(uri):
    with pytest.raises(PistoSegError, match=r"is no bucket's name. Remedy: write s3://BUCKET/KEY") as caught:
        storage.list_dir(uri)
    assert not isinstance(caught.value, UnavailableError)  # others may be readable


def test_a_certificate_that_is_not_trusted_is_no_outage():
    url = "https://s3.lab/bucket"
    refused = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
    error = botocore.exceptions.SSLError(endpoint_url=url, error=refused)
    assert not object_store.is_transient(error)
    with pytest.raises(UnavailableError, match=r"no certificate that this machine trusts.*AWS_CA_BUNDLE"):
        raise object_store.explain(error, "s3://bucket/x")
    broken = botocore.exceptions.SSLError(endpoint_url=url, error="[SSL: UNEXPECTED_EOF_WHILE_READING]")
    assert object_store.is_transient(broken)


def test_a_missing_key_is_no_problem_of_the_storage():
    assert object_store.explain(translated("NoSuchKey"), "s3://bucket/x") is None
    assert object_store.explain(ValueError("a bug"), "s3://bucket/x") is None


def test_a_server_that_stays_away_is_named(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:9")
    with pytest.raises(PistoSegError, match=r"http://127.0.0.1:9 does not answer.*AWS_ENDPOINT_URL"):
        raise object_store.explain(error, "s3://bucket/x")


def test_of_several_that_create_a_file_one_succeeds(tmp_path):
    for uri in (str(tmp_path / "a" / "x [1].json"), "memory://create-test/x"):
        assert storage.create_bytes(uri, b"first")
        assert not storage.create_bytes(uri, b"second")
        assert storage.read_bytes(uri) == b"first"
    assert [item.name for item in (tmp_path / "a").iterdir()] == ["x [1].json"]


@pytest.fixture
def without_links(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)


@pytest.mark.usefixtures("without_links")
def test_a_file_system_without_links_creates_all_the_same(tmp_path):
    assert storage.create_bytes(str(tmp_path / "x"), b"first")
    assert not storage.create_bytes(str(tmp_path / "x"), b"second")
    assert (tmp_path / "x").read_bytes() == b"first"


@pytest.mark.usefixtures("without_links")
def test_a_full_disk_without_links_leaves_no_half_a_file(tmp_path, monkeypatch):
    sync = os.fsync

    def full(number):
        if os.readlink(f"/proc/self/fd/{number}").endswith("manifest.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnavailableError, match="no space is left"):
        storage.create_bytes(str(tmp_path / "manifest.json"), b"{}")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert storage.create_bytes(str(tmp_path / "manifest.json"), b"{}")
