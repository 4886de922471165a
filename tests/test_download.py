"""The downloader against a server on this machine that cuts, stalls, refuses and lies as told."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pooch
import pytest

from data import download
from data.download import FILES, RemoteFile
from helpers import ROOT, Capture, Patch

CONTENT = b"".join(b"%d\tid%d\ta sentence\t%d\n" % (i, i, i % 5) for i in range(9000))
FILE = RemoteFile("sst.csv", hashlib.sha256(CONTENT).hexdigest())
SHAPED = RemoteFile("pairs.csv", columns=("id", "sentence1", "is_duplicate"), num_rows=range(3, 5))
HEADER, ROW = "\tid\tsentence1\tis_duplicate\n", "0\ta\tIs it?\t1.0\n"
CUT = 100_000  # bytes, more than the downloader keeps in memory


class Handler(BaseHTTPRequestHandler):
    """Gives each request the next of `answers`, a status or in words, then the file as it should be."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        assert self.headers["Accept-Encoding"] == "identity", "a range of a compressed file would not fit the part"
        self.server.names.append(self.path.removeprefix("/folder/"))
        self.server.ranges.append(self.headers["Range"])
        content = self.server.contents.get(self.path.split("/")[-1], b"")
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.close_connection = True
        how = self.server.answers.pop(0) if self.server.answers else "whole"
        if how == "hang up":
            self.wfile.close()
        elif how == "cut chunks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n1000\r\n%b" % (CUT, content[:CUT], content[CUT : CUT + 5]))
        elif isinstance(how, int) or start >= len(content):
            status = how if isinstance(how, int) else 416 if content else 404
            self.send(status, b"an error page", 13, f"bytes */{len(content)}")
        else:
            start = 0 if how == "ignore range" else start
            rest, content_range = content[start:], f"bytes {start}-{len(content) - 1}/{len(content)}" * bool(start)
            self.send(206 if start else 200, rest[: CUT if how in ("cut", "stall") else None], len(rest), content_range)
            time.sleep(1 if how == "stall" else 0)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, status: int, body: bytes, length: int, content_range: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """The server, and the command with its files in `folder`; waits between attempts are only noted."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/folder"
        self.contents = {"sst.csv": CONTENT}
        self.answers, self.names = list[str | int](), list[str]()
        self.ranges, self.waits = list[str | None](), list[float]()
        self.folder, self.target, self.part = folder, folder / "sst.csv", folder / "sst.csv.part"

    def fetch(self, *files: RemoteFile, url: str = "", retries: int = 3) -> int:
        flags = f"--base-url {url or self.url} --retries {retries}"
        return download.main([str(self.folder), *flags.split()], files or (FILE,))

    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: Patch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    running = Server(tmp_path / "new" / "data")
    monkeypatch.setattr(pooch.core, "time", SimpleNamespace(sleep=running.waits.append))
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_file_is_fetched_once_and_verified_then(server: Server, capsys: Capture) -> None:
    for shown in ("sst.csv: fetched, verified\n", "sst.csv: already there, verified\n"):
        assert server.fetch(url=server.url + "/") == 0
        assert (server.target.read_bytes(), server.files()) == (CONTENT, ["sst.csv"])
        assert capsys.readouterr() == (shown, "")
    assert server.names == ["sst.csv"]


def test_other_content_is_never_overwritten(server: Server, capsys: Capture) -> None:
    server.folder.mkdir(parents=True)
    server.target.write_bytes(b"mine")
    server.contents["other.csv"] = CONTENT
    assert server.fetch(FILE, RemoteFile("other.csv", FILE.sha256)) == 1
    assert server.target.read_bytes() == b"mine"
    assert server.files() == ["other.csv", "sst.csv"], "the other files are still fetched"
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{server.target}: SHA-256 is {hashlib.sha256(b'mine').hexdigest()}, expected {FILE.sha256}; left" in error


@pytest.mark.parametrize("answers", [["cut", "stall"], ["cut chunks"]])
def test_a_cut_or_stalled_transfer_goes_on_where_it_stopped(
    server: Server, answers: list[str | int], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.answers = list(answers)
    assert server.fetch() == 0
    assert (server.target.read_bytes(), server.files()) == (CONTENT, ["sst.csv"])
    starts = [int((asked or "bytes=0-")[6:-1]) for asked in server.ranges]
    assert len(starts) == 1 + len(answers) and all(CUT * i * 0.95 <= start <= CUT * i for i, start in enumerate(starts))


@pytest.mark.parametrize(
    ("part", "answers", "ranges"),
    [
        (CONTENT[:1234], [], ["bytes=1234-"]),
        (CONTENT[:1234], ["ignore range"], ["bytes=1234-"]),
        (CONTENT, [], [f"bytes={len(CONTENT)}-"]),
        (CONTENT + b"x", [], [f"bytes={len(CONTENT) + 1}-", None]),
    ],
    ids=("goes on", "from the beginning", "complete", "too long"),
)
def test_a_part_of_an_earlier_run_becomes_the_file(server: Server, part: bytes, answers: Any, ranges: Any) -> None:
    server.folder.mkdir(parents=True)
    server.part.write_bytes(part)
    server.answers = answers
    assert server.fetch() == 0
    assert (server.target.read_bytes(), server.files(), server.ranges) == (CONTENT, ["sst.csv"], ranges)


def test_wrong_content_is_removed_with_one_line(server: Server, capsys: Capture) -> None:
    server.contents["sst.csv"] = b"<html>Sign in to the network</html>"
    assert server.fetch() == 1
    assert server.files() == [] and len(server.names) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"download.py: {server.url}/sst.csv: SHA-256 is ") and "; nothing was kept" in error


def test_passing_failures_are_tried_again(server: Server) -> None:
    server.answers = [500, 429, "hang up"]
    assert server.fetch() == 0 and server.waits == [1, 2, 3] and server.target.read_bytes() == CONTENT


def test_retries_end_and_what_arrived_is_kept(server: Server, capsys: Capture) -> None:
    server.answers = [502, 502, "cut"]
    assert server.fetch(retries=2) == 1 and len(server.names) == 3
    assert server.files() == ["sst.csv.part"] and CONTENT.startswith(server.part.read_bytes())
    assert capsys.readouterr().err.startswith("download.py: sst.csv: IncompleteRead(")


def test_a_missing_file_is_not_tried_again(server: Server, capsys: Capture) -> None:
    assert server.fetch(RemoteFile("gone.csv", "0" * 64), FILE) == 1
    assert server.names == ["gone.csv", "sst.csv"]
    assert "gone.csv: HTTP 404 Not Found; --base-url names another place\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://a..b/c", "label empty or too long"),
        ("host/x", "No scheme supplied"),
        ("file:///x", "No connection adapters were found"),
    ],
)
def test_a_server_out_of_reach_is_one_line_with_the_ways_out(
    server: Server, url: str, reason: str, capsys: Capture
) -> None:
    server.folder.mkdir(parents=True)
    (server.folder / "there.csv").write_bytes(CONTENT)
    assert server.fetch(FILE, RemoteFile("there.csv", FILE.sha256), url=url, retries=1) == 1
    shown, error = capsys.readouterr()
    assert shown == "there.csv: already there, verified\n", "what is there is checked without a network"
    ways = f"--base-url URL, or put sst.csv, there.csv into {server.folder} by hand"
    assert error.count("\n") == 1 and reason in error and ways in error
    assert server.files() == ["there.csv"], "nothing has come, nothing is kept"


def test_a_place_that_cannot_be_written_to_is_one_line(server: Server, capsys: Capture) -> None:
    server.folder = Path(__file__)
    assert server.fetch() == 1
    assert capsys.readouterr().err == f"download.py: {server.folder}: File exists, expected a place to write to\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + ROW * 4, ""),
        (HEADER + ROW * 2, "2 rows, expected 3 to 4"),
        ("id\tsentence1\n" + "a\tb\n" * 3, "the first line is 'id sentence1', expected the columns id, sentence1, is_"),
        (HEADER + ROW * 3 + "0\ta\tIs", "the last line is cut short, expected 4 columns"),
        (b"\xff\xfe" * 9, "not UTF-8"),
    ],
)
def test_a_file_without_checksum_is_known_by_its_shape(
    server: Server, content: str | bytes, message: str, capsys: Capture
) -> None:
    server.contents["pairs.csv"] = content if isinstance(content, bytes) else content.encode()
    assert server.fetch(SHAPED) == bool(message)
    assert server.files() == ([] if message else ["pairs.csv"])
    error = capsys.readouterr().err
    assert error.count("\n") == bool(message) and f"pairs.csv: {message}" * bool(message) in error


def test_the_nine_files_of_cs224n_are_known() -> None:
    tasks, splits = ("ids-sst", "quora", "sts"), ("train", "dev", "test-student")
    assert {file.name for file in FILES} == {f"{task}-{split}.csv" for task in tasks for split in splits}
    assert len({bytes.fromhex(file.sha256) for file in FILES if file.sha256 is not None}) == 7
    shapes = {file.name: file.num_rows for file in FILES if file.sha256 is None}
    assert 141_500 in shapes["quora-train.csv"] and 14_000 not in shapes["quora-train.csv"]
    assert 40_430 in shapes["quora-test-student.csv"]


def test_ctrl_c_keeps_the_part_for_the_next_time(server: Server) -> None:
    server.contents[FILES[0].name] = CONTENT
    server.answers = ["stall"]
    command = [sys.executable, "-m", "data.download", str(server.folder), "--base-url", server.url]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    part = server.folder / f"{FILES[0].name}.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert (process.returncode, error.count("\n")) == (130, 1) and "the same command goes on from there\n" in error
    assert server.files() == [part.name] and CONTENT.startswith(part.read_bytes()) and part.read_bytes()
