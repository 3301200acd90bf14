"""Files at addresses: patterns, credentials, and what is tried again."""

import io
import pickle
from base64 import b64encode

import pytest
from shard_server import ShardServer, serve

from addp_core.base.addresses import has_credentials, without_secrets
from addp_core.base.errors import UserError
from addp_core.data import remote
from addp_core.data.remote import Range, RemoteFile, RemoteFiles, expand

pytest.importorskip("aiohttp")
HTTPFileSystem = pytest.importorskip("fsspec.implementations.http").HTTPFileSystem


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    (tmp_path / "a.tar").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "b.tar").write_bytes(b"b" * 1000)
    with serve(tmp_path) as server:
        yield server


def files(tries: int = 3, timeout: float = 10) -> RemoteFiles:
    return RemoteFiles(tries, timeout)


def ranges(server: ShardServer, *bounds: tuple[str, int, int]) -> list[Range]:
    return [Range(expand(f"{server.url}/{name}")[0], start, end) for name, start, end in bounds]


def shown(pattern: str) -> list[str]:
    return [address.shown for address in expand(pattern)]


def test_braces_stand_for_numbers_and_alternatives():
    assert shown("s3://b/x-{08..11}.tar") == [f"s3://b/x-{n}.tar" for n in ("08", "09", "10", "11")]
    assert shown("https://h/{a,b}/{0..1}.tar?download=1") == [f"https://h/{f}/{n}.tar" for f in "ab" for n in "01"]
    assert shown("https://h/x.tar") == ["https://h/x.tar"]


@pytest.mark.parametrize("pattern", ["https://h/{5..1}.tar", "https://h/{x}.tar", "https://h/{0..9999999}.tar"])
def test_braces_that_cannot_be_read(pattern):
    with pytest.raises(UserError, match=r"data\.source: found \{.*expected"):
        expand(pattern)


def test_too_many_files_are_refused_before_they_are_listed():
    with pytest.raises(UserError, match="more than 1,000,000 files"):
        expand("https://h/{0..99999}/{0..99999}/{0..99999}.tar")


@pytest.mark.parametrize(
    "address",
    [
        "https://user:secret@h/x.tar",
        "https://secret@h/x.tar",
        "s3://key:secret@b/x.tar",
        "https://h/x.tar?X-Amz-Signature=secret",
        "https://h/x.tar?a=1&sig=secret",
        "https://h/x.tar?access_token=secret",
        "https://${USER}:secret@h/x.tar",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(address):
    assert has_credentials(address)
    with pytest.raises(UserError, match="holds credentials") as error:
        expand(address)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        "https://${LOGIN}@h/x.tar",
        "https://${A}:${B}@h/x.tar",
        "https://h/x.tar?sig=${SIG}",
        "https://h/x.tar?download=1",
        "hf://datasets/a/b@main/x.tar",
        "photos",
        "a@b",
    ],
)
def test_what_holds_no_credentials(address):
    assert not has_credentials(address)


def test_variables_are_filled_where_the_file_is_read_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("LOGIN", "user:secret")
    [address] = expand("https://${LOGIN}@h/x.tar?sig=${LOGIN}")
    assert address.url == "https://user:secret@h/x.tar?sig=user:secret"
    assert address.shown == "https://${LOGIN}@h/x.tar"
    with pytest.raises(UserError, match="no variable MISSING"):
        expand("https://${MISSING}@h/x.tar")


def test_secrets_are_taken_out_of_other_libraries_messages():
    text = "cannot reach https://user:secret@h/x.tar?sig=secret 'http://secret@h/?a=secret'"
    assert without_secrets(text) == "cannot reach https://h/x.tar 'http://h/'"


def test_parts_of_files(server):
    parts = ranges(server, ("a.tar", 3, 6), ("b.tar", 10, 12), ("a.tar", 0, 2048))
    assert files().read(parts) == [b"\3\4\5", b"bb", bytes(range(256)) * 8]
    assert files().version(parts[0].address).size == 2048


def test_no_bytes_are_no_request(server):
    reader = files()
    assert reader.read(ranges(server, ("a.tar", 3, 3), ("b.tar", 10, 12), ("a.tar", 9, 9))) == [b"", b"bb", b""]
    assert [request.name for request in server.parts] == ["b.tar"]
    assert reader.read(ranges(server, ("a.tar", 3, 3))) == [b""]
    assert reader.read([]) == []


@pytest.mark.parametrize("failure", ["drop", 500, 503, 429])
def test_what_may_pass_is_tried_again(server, failure, caplog):
    server.fail = lambda request: failure if len(server.requests) < 4 else None
    assert files().read(ranges(server, ("a.tar", 3, 6), ("b.tar", 10, 12))) == [b"\3\4\5", b"bb"]
    assert "/a.tar" in caplog.text
    assert "try 2 of 3 follows" in caplog.text


@pytest.mark.parametrize(("failure", "reason"), [("drop", "the connection failed"), (503, "HTTP 503")])
def test_after_the_last_try_the_error_names_the_address(server, failure, reason):
    server.fail = lambda request: failure if request.name == "b.tar" else None
    with pytest.raises(UserError) as error:
        files().read(ranges(server, ("a.tar", 3, 6), ("b.tar", 10, 12)))
    message = str(error.value)
    assert message.startswith(f"data.source: {server.url}/b.tar: {reason}")
    assert "3 times" in message
    assert "\n" not in message
    assert len([request for request in server.requests if request.name == "b.tar"]) == 3


@pytest.mark.parametrize(
    ("failure", "reason"), [(404, "(HTTP 404 N|n)ot (F|f)ound"), (403, "HTTP 403.*check your credentials")]
)
def test_what_will_not_pass_is_an_error_at_once(server, failure, reason):
    server.fail = lambda request: failure
    [part] = ranges(server, ("a.tar", 3, 6))
    for ask in (lambda: files().read([part]), lambda: files().version(part.address)):
        server.requests.clear()
        with pytest.raises(UserError, match=f"{server.url}/a.tar: {reason}"):
            ask()
        assert len(server.requests) <= 2  # HEAD, and GET where HEAD is not allowed


def test_a_silent_server_is_given_up(server):
    server.fail = lambda request: "silence"
    with pytest.raises(UserError, match=r"/a\.tar: no answer within 0\.1 seconds, 2 times"):
        files(tries=2, timeout=0.1).read(ranges(server, ("a.tar", 3, 6)))


def test_a_server_that_sends_whole_files_only(server):
    server.ranges = False
    with pytest.raises(UserError, match="whole files only"):
        files().check_ranges(expand(f"{server.url}/a.tar")[0])
    server.ranges = True
    files().check_ranges(expand(f"{server.url}/a.tar")[0])


def test_credentials_reach_the_server_only(server, monkeypatch, caplog, capfd):
    monkeypatch.setenv("LOGIN", "user:secret")
    caplog.set_level("DEBUG", "addp")
    [address] = expand(server.url.replace("://", "://${LOGIN}@") + "/a.tar?sig=${LOGIN}")
    server.fail = lambda request: 503
    with pytest.raises(UserError) as error:
        files(tries=2).read([Range(address, 3, 6)])
    assert server.requests[0].authorization.startswith("Basic ")
    assert "secret" in server.requests[0].query
    assert "secret" not in str(error.value) + caplog.text + "".join(capfd.readouterr())


def test_logins_of_netrc(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    HTTPFileSystem.clear_instance_cache()  # a connection of another test would have no login
    files().read(ranges(server, ("a.tar", 3, 6)))
    assert server.requests[0].authorization == f"Basic {b64encode(b'user:secret').decode()}"


def test_headers_that_fsspec_is_told_to_send(server, monkeypatch):
    fsspec_config = pytest.importorskip("fsspec.config")
    monkeypatch.setitem(fsspec_config.conf, "http", {"headers": {"Authorization": "Bearer x"}})
    files().read(ranges(server, ("a.tar", 3, 6)))
    assert server.requests[0].authorization == "Bearer x"


def test_a_file_is_read_with_few_requests_and_without_what_is_skipped(server, tmp_path):
    content = bytes(range(256)) * 8192
    (tmp_path / "large.tar").write_bytes(content)

    def read(step: int) -> list[tuple[int, int]]:
        server.requests.clear()
        [address] = expand(f"{server.url}/large.tar")
        with io.BufferedReader(RemoteFile(files(), address, len(content))) as file:
            for start in range(0, len(content), step):
                file.seek(start)
                assert file.read(700) == content[start : start + 700]
            assert file.read() == content[start + 700 :]
            assert file.read(1) == b""
        return [(request.start, request.end) for request in server.parts]

    assert len(read(20_000)) < 12
    parts = read(200_000)
    assert len(parts) < 25
    assert sum(end - start for start, end in parts) < len(content) / 3


def test_copies_for_other_processes_hold_no_connection(server):
    reader = files()
    [part] = ranges(server, ("a.tar", 3, 6))
    reader.read([part])
    assert pickle.loads(pickle.dumps(reader)).read([part]) == [b"\3\4\5"]


def test_a_scheme_that_nothing_reads():
    with pytest.raises(UserError, match=r"fsspec cannot read foo://b/x\.tar"):
        files().version(expand("foo://b/x.tar")[0])
