"""`trustlog-replica probe` against a real HTTP listener and real sockets: it says no whenever nothing says yes."""

import contextlib
import http.server
import json
import socket
import threading

import pytest

from replica.cli.main import main
from replica.cli.probe import listens


@contextlib.contextmanager
def answering(status: int, body: bytes):
    """A server on loopback that gives everybody this answer; yields its address and what was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def probe(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["probe", *map(str, arguments)])
        return ended.value.code, *capsys.readouterr()

    return call


def test_well(probe):
    with answering(200, b'{"ready": true, "problem": null}') as (url, asked):
        assert probe(url)[:2] == (0, "healthy\n")
        code, out, _ = probe(f"{url}/livez", "-o", "json")
        assert (code, json.loads(out)["healthy"]) == (0, True)
    assert asked == ["/readyz", "/livez"]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (503, b'{"ready": false, "problem": "view 3 is not open"}', "view 3 is not open"),
        (503, b"", "Service Unavailable"),
        (500, b'["problem"]', "Internal Server Error"),
        (503, b'{"problem": 7}', "Service Unavailable"),
        (503, b"[" * 100_000, "Service Unavailable"),
        (204, b"", "No Content"),
        (302, b"", "Found"),
    ],
)
def test_not_well(probe, status, body, said):
    with answering(status, body) as (url, _):
        code, out, err = probe(f"{url}/readyz")
    assert (code, out) == (1, "")
    assert said in err


def test_nobody_answers(probe):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # A listener that says nothing, and after it none at all.
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/readyz"
        code, _, err = probe(url, "--timeout", 0.2)
        assert (code, "timed out" in err) == (1, True)
    code, _, err = probe(url)
    assert (code, "does not answer" in err) == (1, True)


def test_what_answers_is_not_http(probe):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"\x00" * 100_000)

        thread = threading.Thread(target=babble)
        thread.start()
        code, _, err = probe(f"http://127.0.0.1:{listener.getsockname()[1]}/readyz")
        thread.join()
    assert (code, "does not answer" in err) == (1, True)


@pytest.mark.parametrize(
    "arguments",
    [[], ["x"], ["ftp://h:1/"], ["http://h/readyz"], ["http://h:x/"], ["http://h:1/", "--log-socket", "/x"]],
)
def test_used_wrongly(probe, arguments):
    assert probe(*arguments)[0] == 2


def test_a_socket_that_somebody_listens_at(probe, tmp_path):
    path = tmp_path / "a b.sock"
    assert probe("--log-socket", path)[0] == 1
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(str(path))
        assert not listens(path), "bound only"
        service.listen()
        assert probe("--log-socket", path)[:2] == (0, "healthy\n")
        assert not listens(path.with_name("b.sock"))
    assert path.exists()
    code, _, err = probe("--log-socket", path)
    assert (code, f"no service listens at {path}" in err) == (1, True), "left behind by one that was killed"
