# SPDX-License-Identifier: GPL-3.0-or-later
"""Requests that a web page, a bug or a stranger could send. Numbers as in the list of faults."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.protocol import GenerateRequest
from tests.faults.harness import Backend, new_id, until
from tests.faults.stand_in_worker import BIG, BIG_BYTES, SLOW

GOOD = {"family": "capsule", "seed": 1}


def test_f01_token(backend: Backend) -> None:
    host = {"Host": backend.headers["Host"]}
    right = backend.token
    wrong = right[:-1] + ("a" if right[-1] != "a" else "b")
    for header in ({}, {"Authorization": f"Bearer {wrong}"}, {"Authorization": "Bearer tökén"},
                   {"Authorization": right}, {"Authorization": f"bearer  {right}"}, {"Cookie": f"token={right}"},
                   {"Authorization": "Bearer "}, {"Authorization": f"Basic {right}"}):  # fmt: skip
        assert backend.error("GET", "/v1/health", headers={**host, **header}) == (401, "unauthorized")
    assert backend.error("GET", f"/v1/health?token={right}&authorization=Bearer%20{right}", headers=host)[0] == 401
    twice = f"GET /v1/health HTTP/1.1\r\nHost: {host['Host']}\r\n" + f"Authorization: Bearer {right}\r\n" * 2 + "\r\n"
    assert _status(backend, twice.encode()) == 401
    backend.still_works()


def test_f02_host(backend: Backend) -> None:
    authorization = backend.headers["Authorization"]
    for host in ("evil.example", f"localhost:{backend.port}", f"[::1]:{backend.port}", "127.0.0.1",
                 f"127.0.0.1:{backend.port}.evil.example", f"evil.example:{backend.port}", ""):  # fmt: skip
        assert backend.error("GET", "/v1/health", headers={"Authorization": authorization, "Host": host})[0] == 403
    line = f"Host: 127.0.0.1:{backend.port}\r\n"
    for version, hosts in (("1.1", ""), ("1.1", line * 2), ("1.0", ""), ("1.1", line + "Host: evil.example\r\n")):
        head = f"GET /v1/health HTTP/{version}\r\n{hosts}Authorization: {authorization}\r\n\r\n"
        assert _status(backend, head.encode()) in (400, 403)
    backend.still_works()


def test_f03_web_pages(backend: Backend) -> None:
    for header in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
                   {"Origin": f"http://127.0.0.1:{backend.port}"}, {"Sec-Fetch-Site": "same-origin"}):  # fmt: skip
        assert backend.error("GET", "/v1/health", headers={**backend.headers, **header}) == (403, "forbidden")
        form = {**backend.headers, **header, "Content-Type": "application/x-www-form-urlencoded"}
        assert backend.error("POST", "/v1/shutdown", b"a=b", form)[0] == 403
        asking = {**header, "Host": backend.headers["Host"], "Access-Control-Request-Method": "POST"}
        assert backend.error("OPTIONS", "/v1/jobs", headers=asking)[0] == 403
    form = {**backend.headers, "Content-Type": "text/plain"}
    body = json.dumps({"id": new_id(), "request": GOOD}).encode()
    assert backend.error("POST", "/v1/jobs", body, form) == (422, "invalid_request")
    backend.still_works()


def test_f04_nothing_without_token(backend: Backend) -> None:
    paths = set(backend.get("/v1/openapi.json")["paths"])
    assert {"/v1/health", "/v1/jobs", "/v1/jobs/{job_id}/result", "/v1/events", "/v1/shutdown"} <= paths
    paths |= {"/", "/docs", "/redoc", "/openapi.json", "/v1", "/v1/", "/v1/openapi.json", "/favicon.ico", "//", "/%2e"}
    for path in paths:
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"):
            headers = {"Host": backend.headers["Host"]}
            status, _, _ = backend.call(method, path.replace("{job_id}", "0" * 32), headers=headers)
            assert status == 401, (method, path)
    for path in ("/", "/docs", "/redoc", "/openapi.json", "/v1/docs", "/v1/health/"):
        assert backend.error("GET", path) == (404, "not_found")
    assert backend.error("PUT", "/v1/jobs", {}) == (405, "method_not_allowed")
    backend.still_works()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"id": "', b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
     b"\xff\xfe{}", '{"id": "\udc80"}'.encode("utf-8", "surrogatepass"), b"null", b"[]", b"1", b'"x"', b"{} {}",
     b'{"id": "%s", "id": "%s", "request": {}}' % (b"0" * 32, b"1" * 32),
     b'{"id": "%s", "request": {"seed": 1, "seed": 2}}' % (b"0" * 32), b"\xef\xbb\xbf{}", b"1" * 5000],
)  # fmt: skip
def test_f05_broken_json(backend: Backend, body: bytes) -> None:
    assert backend.error("POST", "/v1/jobs", body) == (422, "invalid_request")
    backend.still_works()


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", v) for v in ("NaN", "Infinity", "-Infinity", "1e400", "-1", "18446744073709551616", '"5"', "1.5", "true",
                           "null", "[]", "1" * 400)]
    + [("truncation_psi", v) for v in ("NaN", "Infinity", "1e400", "-0.1", "2", '"0.5"', "true", "null")]
    + [("texture_size", v) for v in ("1000", '"1024"', "1e9", "NaN", "true")]
    + [("faces", v) for v in ("0", "1e5", "99999999999", "-1")]
    + [("grid_resolution", v) for v in ("0", "100000")]
    + [("family", v) for v in ('"Capsule"', '"../x"', '"caps\\u0000ule"', "1", '""')]
    + [("parameters", v) for v in ('{"single": NaN}', '{"single": 1e999}', '{"single": 1}', '{"other": true}', "[]")]
    + [("file", '"/etc/passwd"'), ("url", '"http://evil.example"')],
)  # fmt: skip
def test_f06_wrong_values(backend: Backend, name: str, value: str) -> None:
    request = f'"family": {value}' if name == "family" else f'"family": "capsule", "{name}": {value}'
    body = f'{{"id": "{new_id()}", "request": {{{request}}}}}'
    status, _, data = backend.call("POST", "/v1/jobs", body.encode())
    said = json.loads(data)
    assert (status, said["code"]) == (422, "invalid_request")
    not_json = any(word in value for word in ("NaN", "Infinity", "1e400", "1e999"))
    assert not_json or name in said["message"] or name == "parameters"
    assert not_json or len(value) < 5 or value not in data.decode()  # not echoed


def test_f06_still_works(backend: Backend) -> None:
    assert backend.error("POST", "/v1/jobs", {"id": new_id(), "request": {**GOOD, "family": "nobody"}}) == (
        422, "unknown_family")  # fmt: skip
    backend.still_works()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([1024, "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8,
)  # fmt: skip
fields = st.sampled_from([*GenerateRequest.model_fields, "other"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(fields, anything, max_size=4) | anything, st.sampled_from(["request", "id", "client", "x"]))
def test_f06_anything_is_answered(backend: Backend, value: object, place: str) -> None:
    body = json.dumps({"id": new_id(), "request": GOOD} | {place: value}).encode()
    status, _, data = backend.call("POST", "/v1/jobs", body)
    assert status in (200, 422), (body, data)
    if status == 200:
        backend.call("DELETE", f"/v1/jobs/{json.loads(data)['id']}")


def test_f07_large_bodies(backend: Backend) -> None:
    head = "".join(f"{k}: {v}\r\n" for k, v in backend.headers.items()) + "Content-Type: application/json\r\n"
    start = f"POST /v1/jobs HTTP/1.1\r\n{head}"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    backend.still_works()
    before = backend.server.memory_info().rss
    huge = 200 << 20
    for first, piece in ((f"{start}Content-Length: {huge}\r\n\r\n", b" " * 65536),
                         (f"{start}Transfer-Encoding: chunked\r\n\r\n", chunk),
                         (f"{start}Content-Length: 99999999999999999999\r\n\r\n", b" " * 65536)):  # fmt: skip
        sent, answer = _pour(backend, first.encode(), piece, huge)
        assert sent < 16 << 20  # what the sockets' buffers hold
        assert answer[9:12] in (b"413", b"400", b"")  # the answer may be lost with the reset connection
    assert backend.error("POST", "/v1/jobs", b" " * ((1 << 20) + 1)) == (413, "too_large")
    assert backend.error("POST", "/v1/jobs", b" " * (1 << 20)) == (422, "invalid_request")
    assert backend.server.memory_info().rss - before < 8 << 20

    short = f"{start}Content-Length: 10\r\n\r\n".encode() + b"{}" * 200
    assert _status(backend, short) in (400, 422)
    with backend.raw(f"{start}Content-Length: 100\r\n\r\n{{}}".encode()) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100)[9:12] in (b"", b"400")
    both = f"{start}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert _status(backend, both.encode()) in (400, 422)
    for many in ("X-A: " + "a" * 20_000 + "\r\n", "X-A: a\r\n" * 5000, "X-A: aaaa\r\n" * 2500, "X" * 20_000):
        assert _status(backend, f"GET /v1/health HTTP/1.1\r\n{head}{many}\r\n".encode()) in (400, 413)
    assert backend.error("GET", "/v1/jobs?client=" + "a" * 20_000)[0] in (400, 413)
    backend.still_works()


def test_f08_slow_and_idle(backend: Backend) -> None:
    backend.still_works()
    until(lambda: not backend.server.net_connections("tcp")[1:])
    files, threads = backend.server.num_fds(), backend.server.num_threads()
    head = "".join(f"{k}: {v}\r\n" for k, v in backend.headers.items())
    drip = f"POST /v1/jobs HTTP/1.1\r\n{head}Content-Type: application/json\r\nContent-Length: 50\r\n\r\n".encode()
    for slow in (b"GET /v1/hea", drip):  # in the head, in the body
        assert _pour(backend, slow, b" ", 300, pause_s=0.05)[0] < 300
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(backend.raw())
        backend.still_works()
        assert len(backend.server.net_connections("tcp")) < 80
    big = backend.submit(BIG)
    backend.wait(big, "done")
    ask = f"GET /v1/jobs/{big}/result HTTP/1.1\r\n{head}\r\n".encode()
    with backend.raw(ask) as sock:  # gone in mid-download
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK")
    with backend.raw(ask) as sock:  # takes nothing; cut off before the end
        time.sleep(1.5)
        sock.settimeout(30)
        taken = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(1 << 20):
                taken += len(piece)
        assert taken < BIG_BYTES
    assert len(backend.result(big)) > BIG_BYTES
    until(lambda: backend.server.num_fds() <= files, "file handles are left")
    assert backend.server.num_threads() <= threads + 4  # those of the pool for reading files
    backend.still_works()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "C:\\x", "x" * 300, "a\0b", "a\u202eb", "😀", "", "a b", "ä"])
def test_f09_names(backend: Backend, name: str) -> None:
    for body in ({"id": name, "request": GOOD}, {"id": new_id(), "client": name, "request": GOOD}):
        assert backend.error("POST", "/v1/jobs", body) == (422, "invalid_request")
    assert backend.error("GET", f"/v1/jobs/{quote(name, safe='')}/result")[0] in (404, 422)
    assert backend.error("GET", f"/v1/events?client={quote(name, safe='')}")[0] == 422


def test_f09_odd_but_harmless_names(backend: Backend) -> None:
    for client in ("CON", "x.", "..", "-"):
        job_id = backend.submit(3, client)
        assert backend.wait(job_id)["state"] == "done"
        assert [job["id"] for job in backend.get(f"/v1/jobs?client={client}")] == [job_id]
    jobs = backend.home / "data" / "jobs"
    assert all(len(path.name) == 32 for path in jobs.iterdir())
    backend.still_works()


def test_f10_one_job_per_id(backend: Backend) -> None:
    job_id = new_id()
    client = new_id()
    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(lambda _: backend.submit(SLOW + 100, client, job_id), range(50))) == {job_id}
    assert [job["id"] for job in backend.get(f"/v1/jobs?client={client}")] == [job_id]
    other = {"id": job_id, "client": client, "request": {**GOOD, "seed": 99}}
    assert backend.error("POST", "/v1/jobs", other) == (409, "conflict")
    with backend.events(client) as events:
        for event in events:
            if event["state"] == "done":
                break
    assert backend.submit(SLOW + 100, client, job_id) == job_id
    assert backend.get(f"/v1/jobs/{job_id}")["state"] == "done"
    backend.still_works()


def test_f11_clients_take_turns(backend: Backend) -> None:
    names = [f"{new_id()}-{i}" for i in range(10)]
    busy = backend.submit(SLOW + 60_000)
    backend.wait(busy, "running")
    for name in names:
        for seed in range(5):
            backend.submit(SLOW + 20 + seed, name)
    backend.call("DELETE", f"/v1/jobs/{busy}")
    with backend.events(names[-1]) as events:  # who came last gets its first before the first gets its third
        next(event for event in events if event["state"] == "done")
    done = [sum(job["state"] == "done" for job in backend.get(f"/v1/jobs?client={name}")) for name in names]
    assert max(done) <= done[-1] + 2
    for name in names:
        until(lambda name=name: all(job["state"] == "done" for job in backend.get(f"/v1/jobs?client={name}")))
    backend.still_works()


def test_f12_versions_are_said(backend: Backend) -> None:
    health = backend.get("/v1/health")
    assert health["protocol"] == 1
    assert health["version"]
    runtime = json.loads((backend.home / "run" / "backend.json").read_text())
    assert (runtime["protocol"], runtime["version"]) == (health["protocol"], health["version"])
    newer = {"id": new_id(), "request": {**GOOD, "hair_style": "long"}}  # of a newer add-on
    status, _, data = backend.call("POST", "/v1/jobs", newer)
    assert status == 422
    assert "hair_style" in json.loads(data)["message"]
    backend.still_works()


@pytest.mark.parametrize(
    "latents", ['{"a": [[NaN]]}', '{"a": [[Infinity]]}', '{"a": [[1e999]]}', '{"a": []}', '{"a": [[]]}',
                '{"a": [[1], []]}', '{"a": [1]}', '{"a": [["1"]]}', '{"a": 1}', "[]", '{"a": [[true]]}'])  # fmt: skip
def test_f16_latents(backend: Backend, latents: str) -> None:
    body = f'{{"id": "{new_id()}", "request": {{"family": "capsule", "latents": {latents}}}}}'
    assert backend.error("POST", "/v1/jobs", body.encode()) == (422, "invalid_request")
    backend.still_works()


def _status(backend: Backend, data: bytes) -> int:
    with backend.raw(data) as sock:
        return int(sock.recv(1000)[9:12])


def _pour(backend: Backend, first: bytes, piece: bytes, limit: int, pause_s: float = 0) -> tuple[int, bytes]:
    """Send until the other side stops it; returns how much was sent, and the answer."""
    sent, answer = 0, b""
    with backend.raw(first) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < limit:
                sock.sendall(piece)
                sent += len(piece)
                time.sleep(pause_s)
        with contextlib.suppress(ConnectionResetError):
            answer = sock.recv(1000)
    return sent, answer
