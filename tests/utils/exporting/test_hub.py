"""Uploads to a local server that answers as the hub does: what arrives, and what errors say."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from inference.export_model import main
from tests.helpers.vocoder_checkpoint import save_stage_checkpoint, small_vocoder

NAME = "me/tiny-vocoder"


class Hub(BaseHTTPRequestHandler):
    """Keeps what a client asks for; `status` is its answer to a new repository."""

    status = 200
    created: dict
    committed: dict

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        status, answer = 200, {}
        if self.path == "/api/repos/create":
            type(self).created = {**json.loads(body), "token": self.headers["Authorization"]}
            status, answer = self.status, {"error": "no"}
            if status == 200:
                answer = {"url": f"{constants.ENDPOINT}/{NAME}"}
        elif self.path.endswith("/preupload/main"):
            # Small files come in the commit itself.
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {
                "files": [
                    {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths
                ]
            }
        elif self.path.endswith("/commit/main"):
            rows = [json.loads(line) for line in body.splitlines()]
            files = [row["value"] for row in rows if row["key"] == "file"]
            type(self).committed = {file["path"]: file for file in files}
            answer = {"commitUrl": f"{constants.ENDPOINT}/{NAME}/commit/1", "commitOid": "1", "success": True}
        self.answer(status, answer)

    def do_GET(self):
        self.answer(200, {"siblings": [], "id": NAME, "sha": "0"})

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The server's class, whose attributes a test sets and reads."""
    handler = type("TestHub", (Hub,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_stage_checkpoint(small_vocoder(), "vocoder", tmp_path_factory.mktemp("runs") / "vocoder")


def export(run, output, *words):
    return main(["--checkpoint", str(run), "--output", str(output), "--push_to_hub", NAME, *words])


def refusal(run, output, caplog, *words) -> str:
    """The message of an export that ends with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        export(run, output, *words)
    assert stop.value.code == 2
    return caplog.text


def test_all_files_arrive(hub, run, tmp_path, capsys):
    folder = export(run, tmp_path / "out", "--private")
    assert hub.created["token"] == "Bearer hf_secret"
    assert (hub.created["organization"], hub.created["name"]) == ("me", "tiny-vocoder")
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    assert hub.committed.keys() == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert f'from_pretrained("{NAME}")' in (folder / "README.md").read_text()
    assert NAME in capsys.readouterr().out


@pytest.mark.parametrize(("status", "words"), [(409, ["name is taken"]), (401, ["hf auth login"]), (403, ["write"])])
def test_a_refusal_says_what_to_do_and_keeps_the_export(hub, run, tmp_path, caplog, status, words):
    hub.status = status
    text = refusal(run, tmp_path / "out", caplog)
    assert all(word in text for word in [str(status), NAME, *words, f"hf upload {NAME} {tmp_path / 'out'}"]), text
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_network(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = refusal(run, tmp_path / "out", caplog)
    assert "http://127.0.0.1:9" in text and "network" in text and (tmp_path / "out").is_dir()


def test_before_anything_is_written(run, tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "HF_TOKEN" in refusal(run, tmp_path / "out", caplog)
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(run), "--output", str(tmp_path / "out"), "--push_to_hub", "a/b/c"])
    assert "a/b/c" in caplog.text and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(run), "--output", str(tmp_path / "out"), "--private"])
