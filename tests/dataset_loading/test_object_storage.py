"""Tars and packed caches in a bucket, over the protocol of S3, by a server of the package moto."""

import contextlib
import socket
import threading

import pytest

from dataset_loading.cached import CachedDataset
from dataset_loading.image.pixels import IMAGE_SUFFIXES
from dataset_loading.pack import convert
from dataset_loading.remote import open_remote
from dataset_loading.streams.opening import open_any
from tests.dataset_loading.test_remote import make
from tests.dataset_loading.test_tars import prepare, write_tars

moto_server = pytest.importorskip("moto.server", reason="a server of S3 needs moto[server], see requirements-dev.txt")
s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs, see requirements-dev.txt")


class CuttingProxy:
    """Passes connections on to a port; the first `n_cuts` answers of more than `n_bytes` bytes are cut off."""

    def __init__(self, port: int, *, n_bytes: int, n_cuts: int):
        self.target, self.n_bytes, self.n_left = port, n_bytes, n_cuts
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self.pass_on, args=(client, upstream, False), daemon=True).start()
            threading.Thread(target=self.pass_on, args=(upstream, client, True), daemon=True).start()

    def pass_on(self, source, target, is_answer):
        n_bytes = 0
        try:
            while content := source.recv(1 << 16):
                n_bytes += len(content)
                if is_answer and self.n_left and n_bytes > self.n_bytes:
                    self.n_left -= 1
                    target.sendall(content[: len(content) // 2])
                    break
                target.sendall(content)
        except OSError:
            pass
        for connection in (source, target):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """The file system of a server with an empty bucket; `connect` has it ask another port."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dataset_loading.remote.RETRY_SECONDS", 0.001)

    def connect(port: int = server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        return s3fs.S3FileSystem()

    system = connect()
    system.mkdir("bucket")
    system.connect = connect
    yield system
    system.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def test_tars_in_a_bucket(bucket, tmp_path, server):
    raw = write_tars(tmp_path / "raw", 2, 300)
    bucket.put(str(raw), "bucket/tars", recursive=True)
    whole = prepare(raw, tmp_path / "local")
    remote = prepare("s3://bucket/tars", tmp_path / "remote", "--limit", "100")
    remote = prepare("s3://bucket/tars", tmp_path / "remote")
    assert remote["entries"] == whole["entries"] and len(whole["entries"]["validation"])
    # Connections that break in the middle of a tar.
    n_bytes = (raw / "shard-000000.tar").stat().st_size // 2
    proxy = CuttingProxy(server, n_bytes=n_bytes, n_cuts=2)
    bucket.connect(proxy.port)
    again = prepare("s3://bucket/tars", tmp_path / "cut")
    assert not proxy.n_left and again["entries"] == whole["entries"]
    proxy.server.close()


def test_packs_in_a_bucket(bucket, tmp_path, server):
    make(tmp_path / "plain", 0)
    convert(tmp_path / "plain", tmp_path / "packed", 4)
    bucket.put(str(tmp_path / "packed"), "bucket/cache", recursive=True)
    proxy = CuttingProxy(server, n_bytes=12000, n_cuts=2)
    bucket.connect(proxy.port)
    data = CachedDataset(open_remote("s3://bucket/cache", 1), "train")
    expected = CachedDataset(tmp_path / "packed", "train")
    assert all(item["x"].equal(other["x"]) for item, other in zip(data, expected, strict=True))
    assert not proxy.n_left
    proxy.server.close()


def test_what_a_server_refuses_names_the_address(bucket, monkeypatch):
    for read in (
        lambda url: open_any(url, "train", "image", suffixes=IMAGE_SUFFIXES),
        lambda url: open_remote(url, 1),
    ):
        with pytest.raises(FileNotFoundError, match="s3://nowhere/a"):
            read("s3://nowhere/a.tar")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    bucket.connect()
    for read in (
        lambda url: open_any(url, "train", "image", suffixes=IMAGE_SUFFIXES),
        lambda url: open_remote(url, 1),
    ):
        with pytest.raises(PermissionError, match=r"s3://bucket/a\.tar may not be read .*AWS_ACCESS_KEY_ID"):
            read("s3://bucket/a.tar")
