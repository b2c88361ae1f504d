"""The hub: what is cached needs no request, and what fails is one line with its cure. A server of this machine
plays the hub; nothing here leaves the machine."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from huggingface_hub import close_session, constants
from test_description import write_openvlas

from machinery import hub
from machinery.config import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model-1.safetensors": b"1" * 3000, "model-2.safetensors": b"2" * 3000,
         "model.safetensors.index.json": json.dumps(
             {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode(),
         "README.md": b"not needed"}
PATTERNS = ["*.json", "*.safetensors"]
NEEDED = ["config.json", "model.safetensors|model.safetensors.index.json"]


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does for one repository."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server
        hub.asked.append(self.path)
        if hub.status:
            return self.reply(hub.status, b"{}", {"X-Error-Code": hub.code} if hub.code else {})
        if hub.silent_at in self.path:
            return hub.over.wait(60)
        if "/tree/" in self.path:
            return self.reply(200, json.dumps([
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()]).encode())
        if "/api/" in self.path:
            return self.reply(200, json.dumps({"id": "a/model", "sha": SHA, "siblings": [
                {"rfilename": name} for name in hub.files]}).encode())
        name = self.path.rpartition("/")[2]
        data = hub.files.get(name, b"")
        if name == hub.broken and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:1000])
            self.wfile.flush()
            # the line breaks: the client gets a reset instead of the rest
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return None
        return self.reply(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def reply(self, status: int, body: bytes, headers=()) -> None:
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    server.asked, server.status, server.code, server.broken = [], None, None, None
    server.silent_at, server.over, server.files = "nowhere", threading.Event(), FILES
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def use(monkeypatch, tmp_path, endpoint: str) -> None:
    """As HF_ENDPOINT and HF_HOME do when the client is imported."""
    for key in list(os.environ):
        if key.lower().endswith("_proxy"):
            monkeypatch.delenv(key)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    hub.out_of_reach.cache_clear()


@pytest.fixture
def online(server, monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield server
    close_session()
    hub.out_of_reach.cache_clear()


def fetch(check=lambda names: None) -> Path:
    return hub.fetch("a/model", PATTERNS, NEEDED, check)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_model_is_downloaded_once(online):
    seen = []
    folder = fetch(seen.extend)
    assert names(folder) == FILES.keys() - {"README.md"} and seen == list(FILES)
    assert (folder / "model-2.safetensors").read_bytes() == FILES["model-2.safetensors"]
    online.asked.clear()
    assert fetch() == folder and not online.asked
    assert hub.fetch(str(folder), PATTERNS, NEEDED) == folder  # a path is its own folder


@pytest.mark.parametrize("listed", [True, False], ids=["by the client", "file by file"])
def test_what_is_cached_needs_no_hub(listed, online, monkeypatch, tmp_path):
    """Nor does it wait for one that accepts connections and never replies."""
    folder = fetch()
    if not listed:  # as older clients, and transformers, leave the cache
        shutil.rmtree(folder.parents[1] / "trees", ignore_errors=True)
    online.asked.clear()
    online.status = 503
    assert fetch() == folder and not online.asked
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        use(monkeypatch, tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert fetch() == folder
    use(monkeypatch, tmp_path, "http://hub.invalid")
    assert fetch() == folder


@pytest.mark.parametrize("listed", [True, False], ids=["by the client", "file by file"])
@pytest.mark.parametrize("lost", ["model-2.safetensors", "config.json", "model.safetensors.index.json"])
def test_half_a_model_is_noticed_and_completed(lost, listed, online):
    folder = fetch()
    if not listed:
        shutil.rmtree(folder.parents[1] / "trees", ignore_errors=True)
    (folder / lost).resolve().unlink()  # the link remains
    online.status = 503
    with pytest.raises(UserError, match=r"'a/model'.*could not be downloaded.*503"):
        fetch()
    online.status = None
    assert fetch() == folder and (folder / lost).read_bytes() == FILES[lost]


@pytest.mark.parametrize("status, code, cure", [
    (401, None, "HF_TOKEN"), (403, "GatedRepo", "accept its terms.*HF_TOKEN"), (404, "RepoNotFound", "HF_TOKEN"),
    (429, None, "wait some minutes"), (500, None, "network.*HF_ENDPOINT"), (503, None, "network.*HF_ENDPOINT")])
def test_what_the_hub_refuses_is_one_line(status, code, cure, online):
    online.status, online.code = status, code
    with pytest.raises(UserError, match=rf"^'a/model' .*could not be downloaded.*{status}.*{cure}") as error:
        fetch()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["/api/models/", pytest.param("/tree/", marks=pytest.mark.slow)])
def test_a_hub_that_is_silent_is_not_waited_for(place, online, monkeypatch):
    """Some requests of huggingface_hub 2.4 have no time limit: it asks for the list of files six times."""
    monkeypatch.setattr(hub, "REPLY_SECONDS", 0.3)
    online.silent_at = place
    with pytest.raises(UserError, match=r"'a/model' .*[Tt]ime"):
        fetch()


def test_a_broken_line_is_called_that_and_the_same_command_continues(online):
    online.broken = "model-2.safetensors"
    with pytest.raises(UserError, match=r"'a/model'.*download was interrupted.*run the same command again") as error:
        fetch()
    assert "\n" not in str(error.value)
    online.broken = None
    online.asked.clear()
    assert names(fetch()) == FILES.keys() - {"README.md"}
    assert not any("model-1" in path for path in online.asked)  # it is there


def test_what_is_checked_before_gigabytes_arrive(online):
    def refuse(names):
        raise UserError("not this one")

    with pytest.raises(UserError, match=r"^not this one$"):
        fetch(refuse)
    assert not any("resolve" in path for path in online.asked)


def test_a_cache_that_cannot_be_written(online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/nowhere/hub")
    with pytest.raises(UserError, match=r"'a/model'.*set HF_HOME to a folder that is writable"):
        fetch()


# ---- Proxies and certificates, as the client's libraries find them in the environment ----------------------


@pytest.mark.parametrize("variables, expected", [
    ({"http_proxy": "{proxy}"}, True), ({"HTTP_PROXY": "{proxy}"}, True), ({"all_proxy": "{proxy}"}, True),
    ({"ALL_PROXY": "{proxy}"}, True), ({"HTTPS_PROXY": "{proxy}"}, False),
    ({"http_proxy": "{proxy}", "NO_PROXY": "hub.invalid"}, False), ({"ALL_PROXY": "{proxy}", "no_proxy": "*"}, False),
])
def test_proxies_in_all_spellings(variables, expected, server, monkeypatch, tmp_path):
    """Only through it can hub.invalid be reached."""
    use(monkeypatch, tmp_path, "http://hub.invalid")
    for key, value in variables.items():
        monkeypatch.setenv(key, value.format(proxy=f"http://127.0.0.1:{server.server_port}"))
    assert (hub.out_of_reach() is None) == expected
    if expected:
        assert names(fetch()) == FILES.keys() - {"README.md"}
        assert server.asked[0].startswith("http://hub.invalid/api/")
    else:
        with pytest.raises(UserError, match=r"hub does not answer"):
            fetch()
        assert not server.asked


@pytest.mark.parametrize("proxy, reason", [("socks5://127.0.0.1:9", "socksio"), ("http://127.0.0.1:9", "HTTPS_PROXY")])
def test_a_proxy_that_does_not_work(proxy, reason, monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, "http://hub.invalid")
    monkeypatch.setenv("ALL_PROXY", proxy)
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"'a/model'.*could not be downloaded.*{reason}"):
        fetch()
    assert time.monotonic() - started < 60
    close_session()


@pytest.fixture
def certificate(server, tmp_path) -> Path:
    """The server speaks TLS, with a certificate that nobody knows."""
    files = [tmp_path / "key.pem", tmp_path / "cert.pem"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", files[0], "-out", files[1],
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
                   check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return files[1]


def test_a_companys_certificate(certificate, server, monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, f"https://127.0.0.1:{server.server_port}")
    with pytest.raises(UserError, match=r"'a/model'.*set SSL_CERT_FILE to a PEM file") as error:
        fetch()
    assert "\n" not in str(error.value)
    close_session()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # the cure that the message names
    assert names(fetch()) == FILES.keys() - {"README.md"}
    close_session()


@pytest.mark.slow
def test_programs_load_by_hub_id(server, tmp_path):
    """From a mirror named by HF_ENDPOINT; then from the cache, while it fails; then not at all."""
    (tmp_path / "model").mkdir()
    server.files = {path.name: path.read_bytes() for path in write_openvlas(tmp_path / "model").iterdir()}
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
           "CUDA_VISIBLE_DEVICES": ""}
    env.pop("HF_HUB_OFFLINE", None)

    def export(where: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "export_vla.py", "a/model", tmp_path / where, "--format", "hf"]
        return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)

    for out in ("first", "second"):
        done = export(out)
        assert done.returncode == 0 and (tmp_path / out / "config.json").exists(), done.stderr
        asked = list(server.asked)
        server.status = 503
    assert server.asked == asked
    env["HF_HOME"] = str(tmp_path / "other")
    done = export("third")
    assert done.returncode == 1 and re.fullmatch(r"error: 'a/model' .*503.*\n", done.stderr), done.stderr
