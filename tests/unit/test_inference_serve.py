"""The local page over real HTTP: what it answers, and whom and what it refuses."""

import io
import json
import re
import socket
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_student import TEXT_DIM, tiny_config, tiny_student

from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import UsageError
from dkdetr.inference import serve as served
from dkdetr.inference.predict import DKDETR
from dkdetr.inference.serve import ServedParts, listen, serve
from dkdetr.inference.serve_finder import Finder, words_of
from dkdetr.inference.serve_guard import allowed_hosts
from tests.served_world import EVIL, ask, encoded, lying, served_parts, serving

NAMES = ("cat", "traffic cone", "dog")
PNG = {"content-type": "image/png"}


class FakeText:
    identity = "t"

    def encode_texts(self, texts):
        rows = [np.random.default_rng(list(text.encode())).normal(size=TEXT_DIM) for text in texts]
        return (np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_detector(text_encoder=None) -> DKDETR:
    config = tiny_config()
    config = replace(config, data=replace(config.data, image_size=128))
    vocabulary = Vocabulary(
        NAMES, (5, 6, 7), (True,) * 3, ("",) * 3, ("a {}.",), "t", np.eye(3, TEXT_DIM, dtype="f4")
    )
    return DKDETR(tiny_student(), config, vocabulary, text_encoder=text_encoder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> ServedParts:
    return served_parts(tmp_path_factory.mktemp("served"), make_detector(FakeText()))


@pytest.fixture(scope="module")
def port(parts):
    with serving(parts) as port:
        yield port


def predict(port: int, data: bytes, words: str = "", **headers: str):
    status, _, answer = ask(
        port, "POST", f"/api/predict?words={words}", body=data,
        headers=PNG | {name.replace("_", "-"): value for name, value in headers.items()},
    )  # fmt: skip
    return status, json.loads(answer)


def test_the_boxes_are_those_of_predict(port: int, parts: ServedParts):
    data = encoded()
    status, found = predict(port, data, "red%20apple,%20saw%0Ared%20apple")
    assert status == 200
    assert (found["width"], found["height"], found["names"]) == (90, 60, 2)
    (expected,) = parts.detector.predict(
        np.array(Image.open(io.BytesIO(data))), ["red apple", "saw"], threshold=0.01
    )
    assert [each["name"] for each in found["boxes"]] == list(expected.names)
    assert len(expected) > 0
    for each, box, score in zip(
        found["boxes"], expected.boxes_xyxy, expected.scores, strict=True
    ):  # fmt: skip
        np.testing.assert_allclose(each["box"], box, atol=0.051)
        assert each["score"] == pytest.approx(float(score), abs=1e-4)
    _, own = predict(port, data)
    assert {each["name"] for each in own["boxes"]} <= set(NAMES)
    assert own["names"] == 3


def test_boxes_bring_their_names_own_least_score():
    detector = make_detector(FakeText())
    detector.vocabulary = replace(detector.vocabulary, thresholds={NAMES[1]: 0.99})
    finder = Finder(detector)
    least = {(each["name"], each.get("least")) for each in finder.find(encoded(), "")["boxes"]}
    assert (NAMES[1], 0.99) in least  # sent all the same: the page's slider may ask for it
    assert {value for name, value in least if name != NAMES[1]} == {None}
    typed = finder.find(encoded(), NAMES[1])["boxes"]
    assert typed
    assert not any("least" in each for each in typed)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_that_lies_is_looked_at_upright(parts: ServedParts, orientation: int):
    """What the page turns by `orientation` is what the boxes lie on."""
    finder = Finder(parts.detector)
    found = finder.find(lying(orientation, "PNG"), "saw")
    assert (found["width"], found["height"], found["orientation"]) == (60, 90, orientation)
    assert found["boxes"] == finder.find(lying(1, "PNG"), "saw")["boxes"] != []


def test_about_says_what_there_is(port: int):
    _, _, answer = ask(port, "GET", "/api/about")
    about = json.loads(answer)
    assert about["names"] == list(NAMES)
    assert (about["cache"], about["curves"], about["report"], about["student"]) == (True,) * 4
    assert about["examples"] == ["größe <b>1.png"]
    assert about["words_problem"] == ""


@pytest.mark.parametrize(
    ("path", "kind", "holds"),
    [
        ("/", "text/html", b"Drop a picture here"),
        ("/page.css", "text/css", b"--page"),
        ("/page.js", "text/javascript", b'"use strict"'),
        ("/cache?images=2", "text/html", b"teacher's cache"),
        ("/curves", "text/html", b"<path class=\"line1\""),
        ("/report", "text/html", b"the report"),
        ("/examples/0", "image/png", b"PNG"),
    ],
)  # fmt: skip
def test_every_page_comes_with_the_headers(port: int, path: str, kind: str, holds: bytes):
    status, headers, answer = ask(port, "GET", path)
    assert status == 200
    assert headers["content-type"].startswith(kind)
    assert holds in answer
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    scripts = policy.partition("script-src ")[2].partition(";")[0]
    assert scripts == ("" if path in ("/cache?images=2", "/curves", "/report") else "'self'")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers
    assert b"http://" not in answer.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https://" not in answer


def test_names_stay_text(port: int):
    _, _, cache = ask(port, "GET", "/cache?images=12")
    _, _, curves = ask(port, "GET", "/curves")
    assert b"<script" not in cache
    assert EVIL[0].encode() not in cache
    assert b"&lt;b&gt;red&lt;/b&gt;" in cache
    assert b"<s>mine" not in curves
    assert b"&lt;s&gt;mine" in curves
    # The script never builds markup from strings.
    _, _, script = ask(port, "GET", "/page.js")
    assert not any(word in script for word in (b"innerHTML", b"outerHTML", b"insertAdjacent"))
    assert b"eval(" not in script


def test_a_neighbour_leads_to_its_own_image(port: int):
    _, _, page = ask(port, "GET", "/cache?images=3,")
    assert b'href="/cache?images=' in page
    status, _, answer = ask(port, "GET", "/cache?images=400,")
    assert status == 422
    assert "holds no image 400" in json.loads(answer)["error"]
    status, _, answer = ask(port, "GET", "/cache?images=%3Cscript%3E")
    assert (status, answer[:1]) == (422, b"{")


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", "", "[::1]"]
)
def test_another_host_is_refused(port: int, host: str):
    for method, path in (("GET", "/"), ("GET", "/api/about"), ("POST", "/api/predict")):
        status, headers, answer = ask(port, method, path, headers={"host": host} | PNG, body=b"x")
        assert status == 421
        assert "content-security-policy" in headers
        assert b"address that it printed" in answer


def test_localhost_is_a_name_of_it(port: int):
    assert ask(port, "GET", "/", headers={"host": f"LOCALHOST:{port}"})[0] == 200
    assert allowed_hosts("10.1.2.3", 8537) == {"10.1.2.3:8537"}
    assert "localhost" in allowed_hosts("127.0.0.1", 80)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1:{port}"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_origin_may_not_post(port: int, headers: dict[str, str]):
    filled = {name: value.format(port=port) for name, value in headers.items()}
    status, answer = predict(port, encoded(), **filled)
    assert status == 403, answer
    own = {"origin": f"http://127.0.0.1:{port}", "sec-fetch-site": "same-origin"}
    assert predict(port, encoded(), **own)[0] == 200


def test_what_another_site_shows_is_no_part_of_this_page(port: int):
    inside = {
        "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "no-cors",
        "sec-fetch-dest": "image",
    }
    framed = inside | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
    followed = framed | {"sec-fetch-dest": "document"}
    assert ask(port, "GET", "/cache?images=3,", headers=inside)[0] == 403
    assert ask(port, "GET", "/", headers=framed)[0] == 403
    assert ask(port, "GET", "/", headers=followed)[0] == 200


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 by 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty, damaged or none of"),
        (b"<svg xmlns='x' onload='alert(1)'/>", "empty, damaged or none of"),
        (encoded()[:200], "the upload"),
        (bomb(), "pixels"),
        (b"GIF89a" + b"\0" * 40, "empty, damaged or none of"),
    ],
    ids=["empty", "svg", "cut", "bomb", "gif"],
)
def test_what_is_no_picture_is_refused_in_a_sentence(port: int, data: bytes, message: str):
    status, answer = predict(port, data)
    assert status == 422
    assert message in answer["error"]


def test_kinds_and_sizes_have_limits(port: int, monkeypatch):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert predict(port, encoded(), content_type=kind)[0] == 415
    monkeypatch.setattr(served, "MAX_UPLOAD_BYTES", 1000)
    assert predict(port, encoded())[0] == 413
    # Without a length said beforehand the bytes themselves are counted.
    chunks = b"3e8\r\n" + b"x" * 1000 + b"\r\n64\r\n" + b"y" * 100 + b"\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(
            f"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: image/png\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
            + chunks
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_a_picture_that_never_comes(port: int, monkeypatch):
    monkeypatch.setattr(served, "_UPLOAD_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(
            f"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: image/png\r\n"
            "Content-Length: 500\r\n\r\nabc".encode()
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 408")


def test_too_many_words(port: int):
    assert predict(port, encoded(), ",".join(map(str, range(201))))[0] == 422
    status, answer = predict(port, encoded(), "x" * 2001)
    assert status == 422
    assert "at most 2,000" in answer["error"]
    assert words_of(" a  b ,,\n a b,c\n") == ("a b", "c")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/examples/../report.html", 404),
        ("GET", "/examples/%2e%2e%2fsecret", 404),
        ("GET", "/examples/1", 404),
        ("GET", "/examples/-1", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/serve_page.html", 404),
        ("GET", "//evil.example/", 404),
        ("GET", "/cache?images=../../x", 422),
        ("GET", "/api/predict", 405),
        ("PUT", "/", 405),
        ("DELETE", "/cache", 405),
    ],
)
def test_nothing_is_served_by_path(port: int, method: str, path: str, status: int):
    assert ask(port, method, path)[0] == status


def test_a_page_without_words_student_or_cache():
    bare = make_detector()
    with serving(ServedParts(about={}, detector=bare, words_problem="no tower.")) as port:
        assert predict(port, encoded(), "saw")[0] == 422
        assert predict(port, encoded())[0] == 200
        for path in ("/cache", "/curves", "/report"):
            assert ask(port, "GET", path)[0] == 404
    with serving(ServedParts(about={})) as port:
        assert predict(port, encoded())[0] == 404


def test_addresses_and_ports_that_cannot_be():
    for host in ("0.0.0.0", "0", "0.0", "::", "::0", ""):
        with pytest.raises(UsageError, match="without a password"):
            serve(ServedParts(about={}), host=host, port=0, say=print)
    with listen("127.0.0.1", 0) as taken, pytest.raises(UsageError, match="try --port 0"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_the_address_is_told_once_it_listens(monkeypatch):
    class Never:
        def run(self, sockets):
            assert sockets[0].getsockname()[1] > 0

    monkeypatch.setattr("dkdetr.inference.serve.make_server", lambda *_: Never())
    told, said = [], []
    serve(ServedParts(about={}), host="127.0.0.1", port=0, say=said.append, opened=told.append)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", told[0])
    assert said[0].startswith(told[0])


def test_without_the_extra_the_command_says_so(tmp_path):
    (tmp_path / "starlette").mkdir()
    (tmp_path / "starlette" / "__init__.py").write_text(
        "raise ModuleNotFoundError('no', name='starlette')"
    )
    done = subprocess.run(
        [sys.executable, "-c", "from cli import main; main()", "serve", "runs/absent"],
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "pip install 'dkdetr[serve]'" in done.stderr
