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

import pooch
import pytest

from data import download
from data.download import FILES, RemoteFile

ROOT = Path(__file__).resolve().parent.parent
CONTENT = b"".join(b"%d\tid%d\ta sentence\t%d\n" % (i, i, i % 5) for i in range(9000))
FILE = RemoteFile("sst.csv", hashlib.sha256(CONTENT).hexdigest())
SHAPED = RemoteFile("pairs.csv", columns=("id", "sentence1", "is_duplicate"), num_rows=range(3, 5))
HEADER, ROW = "\tid\tsentence1\tis_duplicate\n", "0\ta\tIs it?\t1.0\n"
CUT = 100_000  # bytes, more than the downloader keeps in memory


class Handler(BaseHTTPRequestHandler):
    """Gives each request the next of `answers`, then the file as it should be."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        assert self.headers["Accept-Encoding"] == "identity", "a range of a compressed file would not fit the part"
        self.server.names.append(self.path.removeprefix("/folder/"))
        self.server.ranges.append(self.headers["Range"])
        self.content = self.server.contents.get(self.path.split("/")[-1], b"")
        self.start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.close_connection = True
        self.answer(self.server.answers.pop(0) if self.server.answers else "whole")

    def answer(self, how: str | int) -> None:
        """how: in words, or a status."""
        match how:
            case int():
                self.send(how, b"an error page")
            case "hang up":
                self.wfile.close()
            case "cut" | "stall":
                self.send_rest(CUT)
                time.sleep(1 if how == "stall" else 0)
            case "cut chunks":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n%b\r\n1000\r\n%b" % (CUT, self.content[:CUT], self.content[CUT : CUT + 5]))
            case "ignore range":
                self.send(200, self.content)
            case "another range":
                self.send(206, self.content, content_range=f"0-{len(self.content) - 1}")
            case "appear" | "whole" if self.start < len(self.content):
                if how == "appear":
                    self.server.folder.joinpath("sst.csv").write_bytes(b"mine")
                self.send_rest()
            case _:
                self.send(416 if self.content else 404, b"an error page", content_range="*")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, status: int, body: bytes, length: int | None = None, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if content_range:
            self.send_header("Content-Range", f"bytes {content_range}/{len(self.content)}")
        self.end_headers()
        self.wfile.write(body)

    def send_rest(self, num_bytes: int | None = None) -> None:
        """The file from the start that was asked for, cut off after so many bytes."""
        rest = self.content[self.start :]
        content_range = f"{self.start}-{len(self.content) - 1}" if self.start else ""
        self.send(206 if content_range else 200, rest[:num_bytes], len(rest), content_range)


class Server(ThreadingHTTPServer):
    """The server, and the command with its files in `folder`; waits between attempts are only noted."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/folder"
        self.contents = {"sst.csv": CONTENT}
        self.answers: list[str | int] = []
        self.names: list[str] = []
        self.ranges: list[str | None] = []
        self.waits: list[float] = []
        self.folder, self.target, self.part = folder, folder / "sst.csv", folder / "sst.csv.part"

    def fetch(self, *files: RemoteFile, url: str = "", retries: int = 3) -> int:
        arguments = [str(self.folder), "--base-url", url or self.url, "--retries", str(retries)]
        return download.main(arguments, files or (FILE,))

    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server(tmp_path / "new" / "data")
    monkeypatch.setattr(pooch.core, "time", SimpleNamespace(sleep=running.waits.append))
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def test_a_file_is_fetched_once_and_verified_then(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for shown in ("sst.csv: fetched, verified\n", "sst.csv: already there, verified\n"):
        assert server.fetch(url=server.url + "/") == 0
        assert (server.target.read_bytes(), server.files()) == (CONTENT, ["sst.csv"])
        assert capsys.readouterr() == (shown, "")
    assert server.names == ["sst.csv"]


def test_other_content_is_never_overwritten(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.folder.mkdir(parents=True)
    server.target.write_bytes(b"mine")
    other = RemoteFile("other.csv", hashlib.sha256(b"other").hexdigest())
    server.contents["other.csv"] = b"other"
    assert server.fetch(FILE, other) == 1
    assert server.target.read_bytes() == b"mine"
    assert server.files() == ["other.csv", "sst.csv"], "the other files are still fetched"
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{server.target}: SHA-256 is {hashlib.sha256(b'mine').hexdigest()}, expected {FILE.sha256}; left" in error


def test_a_file_that_appears_during_the_transfer_is_not_overwritten(server: Server) -> None:
    server.answers = ["appear"]
    assert server.fetch() == 1
    assert server.target.read_bytes() == b"mine"


@pytest.mark.parametrize("answers", [["cut"], ["cut", "cut"], ["cut chunks"]])
def test_a_cut_transfer_goes_on_where_it_stopped(server: Server, answers: list[str | int]) -> None:
    server.answers = list(answers)
    assert server.fetch() == 0
    assert (server.target.read_bytes(), server.files()) == (CONTENT, ["sst.csv"])
    first, *others = server.ranges
    assert first is None and len(others) == len(answers)
    starts = [int(str(asked)[6:-1]) for asked in others]
    assert all(CUT * (i + 0.95) < start <= CUT * (i + 1) for i, start in enumerate(starts))


@pytest.mark.parametrize(
    ("part", "answers", "ranges"),
    [
        (CONTENT[:1234], [], ["bytes=1234-"]),
        (CONTENT[:1234], ["ignore range"], ["bytes=1234-"]),
        (CONTENT[:1234], ["another range"], ["bytes=1234-", None]),
        (CONTENT, [], [f"bytes={len(CONTENT)}-"]),
        (CONTENT + b"x", [], [f"bytes={len(CONTENT) + 1}-", None]),
    ],
    ids=["goes on", "sent from the beginning", "another range", "complete", "too long"],
)
def test_a_part_of_an_earlier_run_becomes_the_file(
    server: Server, part: bytes, answers: list[str | int], ranges: list[str | None]
) -> None:
    server.folder.mkdir(parents=True)
    server.part.write_bytes(part)
    server.answers = list(answers)
    assert server.fetch() == 0
    assert (server.target.read_bytes(), server.files(), server.ranges) == (CONTENT, ["sst.csv"], ranges)


def test_wrong_content_is_removed_with_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    content = server.contents["sst.csv"] = b"<html>Sign in to the network</html>"
    assert server.fetch() == 1
    assert server.files() == [] and len(server.names) == 1
    problem = f"SHA-256 is {hashlib.sha256(content).hexdigest()}, expected {FILE.sha256}; nothing was kept"
    assert capsys.readouterr().err == f"download.py: {server.url}/sst.csv: {problem}\n"


@pytest.mark.parametrize("answer", [500, 503, 429, "hang up"])
def test_passing_failures_are_tried_again(server: Server, answer: str | int) -> None:
    server.answers = [answer, answer]
    assert server.fetch() == 0
    assert server.target.read_bytes() == CONTENT
    assert server.waits == [1, 2]


def test_a_stalled_connection_times_out_and_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.answers = ["stall"]
    start = time.monotonic()
    assert server.fetch() == 0
    assert time.monotonic() - start < 0.9
    assert server.target.read_bytes() == CONTENT


@pytest.mark.parametrize("retries", [0, 2])
def test_retries_end_and_what_arrived_is_kept(server: Server, retries: int, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [*[502] * retries, "cut"]
    assert server.fetch(retries=retries) == 1
    assert len(server.names) == retries + 1
    assert server.files() == ["sst.csv.part"] and CONTENT.startswith(server.part.read_bytes())
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("download.py: sst.csv: IncompleteRead(")


def test_a_missing_file_is_not_tried_again_and_the_others_are_fetched(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server.fetch(RemoteFile("gone.csv", "0" * 64), FILE) == 1
    assert server.names == ["gone.csv", "sst.csv"]
    (error,) = capsys.readouterr().err.splitlines()
    assert "gone.csv: HTTP 404 Not Found, expected the file; --base-url names another place" in error


@pytest.mark.parametrize(
    ("url", "reason"), [("http://127.0.0.1:9", "Connection refused"), ("http://a..b/c", "label empty or too long")]
)
def test_a_server_out_of_reach_is_one_line_with_the_ways_out(
    server: Server, url: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.folder.mkdir(parents=True)
    (server.folder / "there.csv").write_bytes(CONTENT)
    assert server.fetch(FILE, RemoteFile("there.csv", FILE.sha256), url=url, retries=1) == 1
    captured = capsys.readouterr()
    assert captured.out == "there.csv: already there, verified\n", "what is there is checked without a network"
    (error,) = captured.err.splitlines()
    assert reason in error and f"--base-url URL, or put sst.csv, there.csv into {server.folder} by hand" in error


def test_a_place_that_cannot_be_written_to_is_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.part.mkdir(parents=True)
    assert server.fetch() == 1
    assert capsys.readouterr().err.startswith(f"download.py: {server.part}: Is a directory, expected a place to")
    server.folder = server.folder / "file"
    server.folder.write_text("")
    assert server.fetch() == 1
    assert capsys.readouterr().err == f"download.py: {server.folder}: File exists, expected a place to write to\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + ROW * 3, ""),
        (HEADER + ROW * 4, ""),
        (HEADER + ROW * 2, "2 rows, expected 3 to 4"),
        (HEADER + ROW * 5, "5 rows, expected 3 to 4"),
        ("id\tsentence1\n" + "a\tb\n" * 3, "the first line is 'id sentence1', expected the columns id, sentence1, is_"),
        ("<html>\nNo\nsuch\nfile\n", "the first line is '<html>', expected the columns"),
        (HEADER + ROW * 3 + "0\ta\tIs", "the last line is cut short, expected 4 columns"),
        (b"\xff\xfe" * 9, "not UTF-8"),
        ("\n", "the first line is '', expected the columns"),
    ],
)
def test_a_file_without_checksum_is_known_by_its_shape(
    server: Server, content: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.contents["pairs.csv"] = content if isinstance(content, bytes) else content.encode()
    assert server.fetch(SHAPED) == bool(message)
    assert server.files() == ([] if message else ["pairs.csv"])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == bool(message) and all(f"pairs.csv: {message}" in error for error in errors)


def test_the_nine_files_of_cs224n_are_known() -> None:
    tasks, splits = ("ids-sst", "quora", "sts"), ("train", "dev", "test-student")
    assert {file.name for file in FILES} == {f"{task}-{split}.csv" for task in tasks for split in splits}
    checksums = {file.sha256 for file in FILES if file.sha256 is not None}
    assert {len(bytes.fromhex(checksum)) for checksum in checksums} == {32} and len(checksums) == 7
    shapes = {file.name: file.num_rows for file in FILES if file.sha256 is None}
    assert set(shapes) == {"quora-train.csv", "quora-test-student.csv"}
    assert 141_500 in shapes["quora-train.csv"] and 14_000 not in shapes["quora-train.csv"]
    assert 40_430 in shapes["quora-test-student.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: DIR"),
        (["x", "--retries", "-1"], "argument --retries: invalid choice: -1"),
        (["x", "--base-url", "file:///x"], "argument --base-url: 'file:///x', expected an address like https:"),
        (["x", "--base-url", "host/x"], "argument --base-url: 'host/x', expected an address like https:"),
        (["x", "--base-url", "http://a/x?y"], "argument --base-url: 'http://a/x?y', expected an address"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        download.main(arguments)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"download.py: {message}")


def test_ctrl_c_keeps_the_part_for_the_next_time(server: Server) -> None:
    server.contents[FILES[0].name] = CONTENT
    server.answers = ["stall"]
    command = [sys.executable, str(ROOT / "data" / "download.py"), str(server.folder), "--base-url", server.url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    part = server.folder / f"{FILES[0].name}.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert error == "download.py: interrupted; what has arrived is kept, the same command goes on from there\n"
    assert server.files() == [part.name] and CONTENT.startswith(part.read_bytes()) and part.read_bytes()
