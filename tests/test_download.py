"""The downloader against a server on this machine that cuts, stalls, refuses and lies as told."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import download
from data.download import FILES, RemoteFile, Source, fetch_all

ROOT = Path(__file__).resolve().parent.parent
CONTENT = b"".join(b"%d\tid%d\ta sentence\t%d\n" % (i, i, i % 5) for i in range(9000))  # more than two chunks
FILE = RemoteFile("sst.csv", hashlib.sha256(CONTENT).hexdigest())
CUT = 100_000  # bytes

Answer = Callable[["Handler"], None]


@dataclass
class Server:
    """answers: what the next requests get, in order; then the file as it should be. ranges: as they were asked for."""

    url: str = ""
    contents: dict[str, bytes] = field(default_factory=lambda: {"sst.csv": CONTENT})
    answers: list[Answer] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def do_GET(self) -> None:
        self.state.paths.append(self.path)
        self.state.ranges.append(self.headers["Range"])
        self.close_connection = True
        answer = self.state.answers.pop(0) if self.state.answers else whole
        answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def content(self) -> bytes:
        return self.state.contents.get(self.path.split("/")[-1], b"")

    @property
    def start(self) -> int:
        return int((self.headers["Range"] or "bytes=0-")[6:-1])

    def send(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


def whole(handler: Handler) -> None:
    """The file, or the rest of it, as a server should."""
    content, start = handler.content, handler.start
    if not content:
        handler.send(404, b"no such file")
    elif not handler.headers["Range"]:
        handler.send(200, content)
    elif start >= len(content):
        handler.send(416, b"", Content_Range=f"bytes */{len(content)}")
    else:
        handler.send(206, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")


def cut(handler: Handler) -> None:
    """Promises all and ends early."""
    content, start = handler.content, handler.start
    headers = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
    handler.send(206 if start else 200, content[start : start + CUT], len(content) - start, **headers)


def cut_in_chunks(handler: Handler) -> None:
    """A chunked answer that ends early."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n" % CUT + handler.content[:CUT] + b"\r\n1000\r\n" + handler.content[CUT : CUT + 5])


def ignore_range(handler: Handler) -> None:
    handler.send(200, handler.content)


def ignore_range_and_cut(handler: Handler) -> None:
    handler.send(200, handler.content[:CUT], len(handler.content))


def wrong_range(handler: Handler) -> None:
    handler.send(206, handler.content, Content_Range=f"bytes 0-{len(handler.content) - 1}/{len(handler.content)}")


def stall(handler: Handler) -> None:
    handler.send(200, handler.content[:CUT], len(handler.content))
    time.sleep(1)


def hang(handler: Handler) -> None:
    stall(handler)
    time.sleep(20)


def hang_up(handler: Handler) -> None:
    handler.wfile.close()


def status(code: int) -> Answer:
    return lambda handler: handler.send(code, b"an error page")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = Server()
    handler = type("Scripted", (Handler,), {"state": state})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    state.url = f"http://127.0.0.1:{running.server_address[1]}/folder"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    running.shutdown()
    running.server_close()
    thread.join()


@dataclass
class Fetch:
    """Fetches files from the server into `folder`; waits are only noted."""

    server: Server
    folder: Path
    waits: list[float] = field(default_factory=list)

    def __call__(self, *files: RemoteFile, retries: int = 3, timeout: float = 10.0) -> int:
        source = Source(self.server.url, retries, timeout, self.waits.append)
        return fetch_all(self.folder, source, files or (FILE,))

    @property
    def target(self) -> Path:
        return self.folder / "sst.csv"

    @property
    def part(self) -> Path:
        return self.folder / "sst.csv.part"


@pytest.fixture
def fetch(server: Server, tmp_path: Path) -> Fetch:
    return Fetch(server, tmp_path)


def files_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------------------------------------------- transfers


def test_a_file_is_fetched_and_verified(fetch: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch() == 0
    assert fetch.target.read_bytes() == CONTENT
    assert files_in(fetch.folder) == ["sst.csv"]
    assert fetch.server.paths == ["/folder/sst.csv"]
    captured = capsys.readouterr()
    assert captured.out == "sst.csv: fetched, verified\n"
    assert captured.err == "", "no bar without a terminal"


def test_a_verified_file_is_not_fetched_again(fetch: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.target.write_bytes(CONTENT)
    assert fetch() == 0
    assert fetch.server.paths == []
    assert capsys.readouterr().out == "sst.csv: already there, verified\n"


def test_other_content_is_never_overwritten(fetch: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.target.write_bytes(b"mine")
    other = RemoteFile("other.csv", hashlib.sha256(b"other").hexdigest())
    fetch.server.contents["other.csv"] = b"other"
    assert fetch(FILE, other) == 1
    assert fetch.target.read_bytes() == b"mine"
    assert files_in(fetch.folder) == ["other.csv", "sst.csv"], "the other files are still fetched"
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{fetch.target}: SHA-256 is {hashlib.sha256(b'mine').hexdigest()}, expected {FILE.sha256}" in error
    assert "left as it is" in error


@pytest.mark.parametrize("cuts", [1, 2])
def test_a_cut_transfer_goes_on_where_it_stopped(fetch: Fetch, cuts: int) -> None:
    fetch.server.answers = [cut] * cuts
    assert fetch() == 0
    assert fetch.target.read_bytes() == CONTENT
    assert fetch.server.ranges == [None, *(f"bytes={CUT * (i + 1)}-" for i in range(cuts))]


def test_progress_makes_up_for_failures(fetch: Fetch) -> None:
    assert len(CONTENT) > 2 * CUT
    fetch.server.answers = [cut, cut]
    assert fetch(retries=1) == 0
    assert fetch.waits == [1.0, 1.0]


def test_a_chunked_transfer_that_is_cut_goes_on(fetch: Fetch) -> None:
    fetch.server.answers = [cut_in_chunks]
    assert fetch() == 0
    assert fetch.target.read_bytes() == CONTENT
    assert fetch.server.ranges[0] is None
    assert int(str(fetch.server.ranges[1])[6:-1]) >= CUT


def test_a_part_of_an_earlier_run_is_continued(fetch: Fetch) -> None:
    fetch.part.write_bytes(CONTENT[:1234])
    assert fetch() == 0
    assert fetch.server.ranges == ["bytes=1234-"]
    assert fetch.target.read_bytes() == CONTENT
    assert files_in(fetch.folder) == ["sst.csv"]


def test_a_server_that_ignores_ranges_sends_the_file_anew(fetch: Fetch) -> None:
    fetch.part.write_bytes(CONTENT[:1234])
    fetch.server.answers = [ignore_range]
    assert fetch() == 0
    assert fetch.target.read_bytes() == CONTENT


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(fetch: Fetch) -> None:
    fetch.server.answers = [ignore_range_and_cut] * 50
    assert fetch(retries=2) == 1
    assert len(fetch.server.paths) == 3
    assert fetch.part.stat().st_size == CUT
    assert not fetch.target.exists()


def test_another_range_than_asked_for_is_not_appended(fetch: Fetch) -> None:
    fetch.part.write_bytes(CONTENT[:1234])
    fetch.server.answers = [wrong_range]
    assert fetch() == 0
    assert fetch.target.read_bytes() == CONTENT


def test_a_complete_part_is_verified_and_takes_its_name(fetch: Fetch) -> None:
    fetch.part.write_bytes(CONTENT)
    assert fetch() == 0
    assert fetch.server.ranges == [f"bytes={len(CONTENT)}-"]
    assert files_in(fetch.folder) == ["sst.csv"]


def test_a_part_longer_than_the_file_starts_over(fetch: Fetch) -> None:
    fetch.part.write_bytes(b"x" * (len(CONTENT) + 1))
    assert fetch(retries=0) == 0
    assert fetch.server.ranges == [f"bytes={len(CONTENT) + 1}-", None]
    assert fetch.target.read_bytes() == CONTENT


def test_wrong_content_is_removed_with_one_line(fetch: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.server.contents["sst.csv"] = b"<html>Sign in to the network</html>"
    assert fetch() == 1
    assert files_in(fetch.folder) == []
    error = capsys.readouterr().err
    found = hashlib.sha256(fetch.server.contents["sst.csv"]).hexdigest()
    assert error == (
        f"download.py: {fetch.server.url}/sst.csv: SHA-256 is {found}, expected {FILE.sha256}; nothing was kept\n"
    )


def test_a_part_of_another_file_is_found_out(fetch: Fetch) -> None:
    fetch.part.write_bytes(b"something else")
    assert fetch() == 1
    assert files_in(fetch.folder) == []
    assert fetch() == 0


@pytest.mark.parametrize("answer", [status(500), status(503), status(429), hang_up])
def test_passing_failures_are_tried_again(fetch: Fetch, answer: Answer) -> None:
    fetch.server.answers = [answer, answer]
    assert fetch() == 0
    assert fetch.target.read_bytes() == CONTENT
    assert fetch.waits == [1.0, 2.0]


def test_a_stalled_connection_times_out_and_goes_on(fetch: Fetch) -> None:
    fetch.server.answers = [stall]
    start = time.monotonic()
    assert fetch(timeout=0.2) == 0
    assert time.monotonic() - start < 0.9
    assert fetch.server.ranges == [None, f"bytes={CUT}-"]
    assert fetch.target.read_bytes() == CONTENT


def test_waits_grow_and_retries_end(fetch: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.server.answers = [status(502)] * 50
    assert fetch(retries=7) == 1
    assert fetch.waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert len(fetch.server.paths) == 8
    error = capsys.readouterr().err
    assert "sst.csv: HTTP 502 Bad Gateway" in error
    assert error.count("\n") == 1


def test_no_retries_means_one_attempt(fetch: Fetch) -> None:
    fetch.server.answers = [status(500)]
    assert fetch(retries=0) == 1
    assert (len(fetch.server.paths), fetch.waits) == (1, [])


def test_a_missing_file_is_not_tried_again_and_the_others_are_fetched(
    fetch: Fetch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(RemoteFile("gone.csv", "0" * 64), FILE) == 1
    assert fetch.server.paths == ["/folder/gone.csv", "/folder/sst.csv"]
    assert files_in(fetch.folder) == ["sst.csv"]
    error = capsys.readouterr().err
    assert "gone.csv: HTTP 404 Not Found, expected the file; --base-url names another place" in error


def test_a_server_out_of_reach_is_one_line_with_the_ways_out(fetch: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.server.url = "http://127.0.0.1:9"
    (fetch.folder / "there.csv").write_bytes(CONTENT)
    there = RemoteFile("there.csv", FILE.sha256)
    assert fetch(FILE, there, retries=1) == 1
    captured = capsys.readouterr()
    assert captured.out == "there.csv: already there, verified\n", "what is there is checked without a network"
    assert captured.err.count("\n") == 1
    assert "Connection refused" in captured.err
    assert f"--base-url URL, or put sst.csv, there.csv into {fetch.folder} by hand" in captured.err


def test_a_place_that_cannot_be_written_to_is_one_line(fetch: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.part.mkdir()
    assert fetch() == 1
    error = capsys.readouterr().err
    assert error.startswith(f"download.py: {fetch.part}: ")
    assert error.count("\n") == 1


def test_a_file_that_appears_meanwhile_is_not_overwritten(fetch: Fetch) -> None:
    def appear(handler: Handler) -> None:
        fetch.target.write_bytes(b"mine")
        whole(handler)

    fetch.server.answers = [appear]
    assert fetch() == 1
    assert fetch.target.read_bytes() == b"mine"


# ------------------------------------------------------------------------------------------------------- shapes

SHAPED = RemoteFile("pairs.csv", columns=("id", "sentence1", "is_duplicate"), num_rows=range(3, 5))
HEADER = "\tid\tsentence1\tis_duplicate\n"
ROW = "0\ta\tIs it?\t1.0\n"


@pytest.mark.parametrize("num_rows", [3, 4])
def test_a_file_without_checksum_is_known_by_its_shape(fetch: Fetch, num_rows: int) -> None:
    fetch.server.contents["pairs.csv"] = (HEADER + ROW * num_rows).encode()
    assert fetch(SHAPED) == 0
    assert files_in(fetch.folder) == ["pairs.csv"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + ROW * 2, "2 rows, expected 3 to 4"),
        (HEADER + ROW * 5, "5 rows, expected 3 to 4"),
        ("id\tsentence1\n" + "a\tb\n" * 3, "the first line is 'id sentence1', expected the columns id, sentence1, is_"),
        ("<html>\nNo\nsuch\nfile\n", "the first line is '<html>', expected the columns"),
        (HEADER + ROW * 3 + "0\ta\tIs", "the last line is cut short, expected 4 columns"),
        (b"\xff\xfe" * 9, "not UTF-8"),
        ("\n", "the first line is '', expected the columns"),
    ],
)
def test_a_wrong_shape_is_refused(
    fetch: Fetch, content: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch.server.contents["pairs.csv"] = content if isinstance(content, bytes) else content.encode()
    assert fetch(SHAPED) == 1
    assert files_in(fetch.folder) == []
    error = capsys.readouterr().err
    assert f"pairs.csv: {message}" in error
    assert error.count("\n") == 1


def test_the_nine_files_of_cs224n_are_known() -> None:
    names = {
        f"{task}-{split}.csv" for task in ("ids-sst", "quora", "sts") for split in ("train", "dev", "test-student")
    }
    assert {file.name for file in FILES} == names
    for file in FILES:
        if file.name in ("quora-train.csv", "quora-test-student.csv"):
            assert file.sha256 is None
            assert {"id", "sentence1", "sentence2"} <= set(file.columns)
        else:
            assert len(bytes.fromhex(str(file.sha256))) == 32
    assert len({file.sha256 for file in FILES}) == 8
    shapes = {file.name: file.num_rows for file in FILES if file.sha256 is None}
    assert 141_500 in shapes["quora-train.csv"]
    assert 40_430 in shapes["quora-test-student.csv"]
    assert 14_000 not in shapes["quora-train.csv"]


# ------------------------------------------------------------------------------------------------------ command


def test_the_command_takes_a_mirror_and_makes_the_directory(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    assert download.main([str(folder), "--base-url", server.url + "/", "--retries", "0"], (FILE,)) == 0
    assert server.paths == ["/folder/sst.csv"]
    assert files_in(folder) == ["sst.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: DIR"),
        (["x", "--retries", "-1"], "argument --retries: '-1', expected a whole number from 0 up"),
        (["x", "--retries", "two"], "argument --retries: 'two', expected a whole number from 0 up"),
        (["x", "--base-url", "ftp://host/x"], "argument --base-url: 'ftp://host/x', expected an address like https:"),
        (["x", "--base-url", "file:///x"], "argument --base-url: 'file:///x', expected an address like https:"),
        (["x", "--base-url", "host/x"], "argument --base-url: 'host/x', expected an address like https:"),
        (["x", "--base-url", "http://host:99999"], "argument --base-url: 'http://host:99999', expected an address"),
        (["x", "--base-url", "http://a b"], "argument --base-url: 'http://a b', expected an address"),
        (["x", "--force"], "unrecognized arguments: --force"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        download.main(arguments)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(f"download.py: {message}")
    assert text.count("\n") == 1


def test_a_file_in_place_of_the_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert download.main([str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == (
        f"download.py: {tmp_path / 'file'}: File exists, expected a directory to write to\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_keeps_the_part_for_the_next_time(server: Server, tmp_path: Path) -> None:
    server.contents[FILES[0].name] = CONTENT
    server.answers = [hang]
    command = [sys.executable, str(ROOT / "data" / "download.py"), str(tmp_path), "--base-url", server.url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    part = tmp_path / f"{FILES[0].name}.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert error == f"download.py: interrupted; {part} is kept, the same command goes on from there\n"
    assert CONTENT.startswith(part.read_bytes())
    assert part.read_bytes()
