"""Fetch the public CS224N files into a directory, checked before they take their names.

    python data/download.py DIR

A transfer that breaks goes on where it stopped, also in a later run; files that are there are checked and never
overwritten. `--base-url` names a mirror.
"""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

BASE_URL = "https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/main/data"
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 16  # bytes
RETRIED = (408, 429)  # besides all server errors: request timeout, too many requests


class FileError(Exception):
    """One file cannot be had or is not what it should be; the others may be fine. The message is one line."""


class UnreachableError(Exception):
    """The server does not answer, so no further file can be had. The message is one line."""


class BrokenTransfer(Exception):
    """A transfer ended before its end; trying again may help."""


@dataclass(frozen=True)
class RemoteFile:
    """A file and how it is recognised: by its SHA-256, or by its columns and number of rows where none is known."""

    name: str
    sha256: str | None = None
    columns: tuple[str, ...] = ()
    num_rows: range = range(0)

    def problem(self, path: Path) -> str | None:
        """What is wrong with a file's content, None if this is the file."""
        return self._shape_problem(path) if self.sha256 is None else self._checksum_problem(path)

    def _checksum_problem(self, path: Path) -> str | None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return None if found == self.sha256 else f"SHA-256 is {found}, expected {self.sha256}"

    def _shape_problem(self, path: Path) -> str | None:
        try:
            with path.open(encoding="utf-8-sig", newline="\n") as file:
                header = next(file, "").rstrip("\r\n").split("\t")
                num_rows, last = 0, ""
                for line in file:
                    num_rows, last = num_rows + 1, line
        except UnicodeDecodeError as error:
            return f"not UTF-8 ({error.reason}), expected a UTF-8 file"
        if not set(self.columns) <= set(header):
            return f"the first line is {' '.join(header)[:60]!r}, expected the columns {', '.join(self.columns)}"
        if num_rows not in self.num_rows:
            return f"{num_rows:,} rows, expected {self.num_rows.start:,} to {self.num_rows.stop - 1:,}"
        if last.count("\t") != len(header) - 1:
            return f"the last line is cut short, expected {len(header)} columns"
        return None


FILES = (
    RemoteFile("ids-sst-train.csv", "03b2b625c090f94a6afd59f114cde5282e2053aab0b101e87ed695d8a0c5b1df"),
    RemoteFile("ids-sst-dev.csv", "a186ce94577635fbe10beaaddd50f16cccf6c30973221cefdf90deed2a584bfe"),
    RemoteFile("ids-sst-test-student.csv", "bdd5a767faa0c26782117e37767ece154c30d5d04fb8727d09c71e3850a55c7b"),
    RemoteFile(
        "quora-train.csv",
        columns=("id", "sentence1", "sentence2", "is_duplicate"),
        num_rows=range(140_000, 143_001),
    ),
    RemoteFile("quora-dev.csv", "bfa3cc954a9ba300ae776a980141de65f622a3c1b97e3fd905d63245bc36d5ad"),
    RemoteFile(
        "quora-test-student.csv",
        columns=("id", "sentence1", "sentence2"),
        num_rows=range(40_000, 41_001),
    ),
    RemoteFile("sts-train.csv", "15d12efc2d656fffb1d61ac1f08ec4227f43925fd16f420c037cbd063699c21b"),
    RemoteFile("sts-dev.csv", "ce3cad6f16062586ac7ba462c28b010a9be10c530fd5074165860d7b7ab4e93d"),
    RemoteFile("sts-test-student.csv", "dee455745b72e9ca3ff74e7c056bd73e34bad5b8d5641045a2c1e7e131866f47"),
)


@dataclass(frozen=True)
class Source:
    """Where files come from and how patiently. retries: attempts in a row that bring nothing new; timeout: seconds."""

    base_url: str = BASE_URL
    retries: int = 3
    timeout: float = TIMEOUT
    sleep: Callable[[float], None] = time.sleep

    def url(self, name: str) -> str:
        return f"{self.base_url.rstrip('/')}/{name}"


def fetch(file: RemoteFile, folder: Path, source: Source) -> str:
    """Makes sure that the file is in the folder; returns how, in words. Never overwrites a file."""
    target, part = folder / file.name, part_path(folder, file)
    if os.path.lexists(target):
        _refuse_other_content(file, target)
        return "already there, verified"
    with tqdm(desc=file.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        transfer(source.url(file.name), part, source, bar)
    problem = file.problem(part)
    if problem:
        part.unlink()
        raise FileError(f"{source.url(file.name)}: {problem}; nothing was kept")
    if os.path.lexists(target):
        _refuse_other_content(file, target)
    part.rename(target)
    return "fetched, verified"


def part_path(folder: Path, file: RemoteFile) -> Path:
    """Where a transfer is collected until it is complete."""
    return folder / f"{file.name}.part"


def _refuse_other_content(file: RemoteFile, path: Path) -> None:
    problem = file.problem(path)
    if problem:
        raise FileError(f"{path}: {problem}; left as it is, move it away to fetch the public file")


def transfer(url: str, part: Path, source: Source, bar: Any) -> None:
    """Completes `part` from the server, with retries that go on where the last attempt stopped."""
    failures, most = 0, 0
    while True:
        try:
            return receive(url, part, source.timeout, bar)
        except BrokenTransfer as error:
            size = part.stat().st_size if part.exists() else 0
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            if failures > source.retries:
                raise UnreachableError(f"{url}: {error}") from None
            bar.set_postfix_str(f"retry {failures} of {source.retries}: {error}")
            source.sleep(min(2.0 ** (failures - 1), 30.0))


def receive(url: str, part: Path, timeout: float, bar: Any) -> None:
    """One attempt: asks for what `part` lacks and appends it.

    Raises BrokenTransfer if another attempt may help, FileError if not.
    """
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response: HTTPResponse = urlopen(request, timeout=timeout)
    except HTTPError as error:
        with error:
            if error.code == 416 and have:
                if error.headers.get("Content-Range", "") == f"bytes */{have}":
                    return
                part.unlink()  # longer than the file, so the beginning of another one
                return receive(url, part, timeout, bar)
            message = f"HTTP {error.code} {error.reason}"
        if error.code >= 500 or error.code in RETRIED:
            raise BrokenTransfer(message) from None
        raise FileError(f"{url}: {message}, expected the file; --base-url names another place") from None
    except (OSError, HTTPException, UnicodeError) as error:  # UnicodeError: a host name that is none
        raise BrokenTransfer(_reason(error)) from None
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise BrokenTransfer("the server sent another range than asked for")
        _append(response, part, have if resumed else 0, bar)


def _append(response: HTTPResponse, part: Path, start: int, bar: Any) -> None:
    """Writes the body of a response from position `start` on; 0 writes the file anew."""
    length = response.headers.get("Content-Length", "")
    expected = start + int(length) if length.isdecimal() else None
    received = start
    bar.total, bar.n = expected, start
    bar.refresh()
    with part.open("ab" if start else "wb") as file:
        while True:
            try:
                chunk = response.read1(CHUNK)
            except (OSError, HTTPException) as error:
                raise BrokenTransfer(_reason(error)) from None
            if not chunk:
                break
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    if expected is not None and received != expected:
        raise BrokenTransfer(f"the connection ended after {received:,} of {expected:,} bytes")


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, URLError) else error
    return " ".join(str(reason).split()) or type(reason).__name__


def fetch_all(folder: Path, source: Source, files: Sequence[RemoteFile] = FILES) -> int:
    """Fetches what is missing, one line a file. Returns the exit code: 0 all files are there, else 1."""
    failed = 0
    for file in sorted(files, key=lambda file: not os.path.lexists(folder / file.name)):  # checks need no network
        try:
            print(f"{file.name}: {fetch(file, folder, source)}", flush=True)
        except FileError as error:
            failed = 1
            _complain(str(error))
        except UnreachableError as error:
            _complain(
                f"{error}; try again later, name a mirror with --base-url URL, or put {_names(files)} into {folder} "
                "by hand and run this command again to verify them"
            )
            return 1
        except OSError as error:
            _complain(f"{error.filename or folder}: {error.strerror or error}")
            return 1
    return failed


def _names(files: Sequence[RemoteFile]) -> str:
    return ", ".join(file.name for file in files)


def _complain(message: str) -> None:
    print(f"download.py: {message}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------ command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists what is allowed)\n")


def web_address(text: str) -> str:
    """The value of --base-url. Raises ArgumentTypeError if it is no http address that a file name can follow."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or not text.isascii() or not text.isprintable() or set(text) & set(" ?#"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected an address like https://host/folder")
    return text


def retry_count(text: str) -> int:
    """The value of --retries."""
    if not (text.isdecimal() and text.isascii()):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 0 up")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="download.py",
        description="Fetch the public CS224N files into a directory. Files that are there are checked, not fetched.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the files go; created if missing")
    parser.add_argument("--base-url", metavar="URL", type=web_address, default=BASE_URL, help="address of the folder")
    parser.add_argument(
        "--retries", metavar="N", type=retry_count, default=3, help="of an attempt that brought nothing"
    )
    return parser


def main(arguments: Sequence[str] | None = None, files: Sequence[RemoteFile] = FILES) -> int:
    """The command. Returns its exit code: 0 all files are there, 1 some are not, 130 when interrupted."""
    args = build_parser().parse_args(arguments)
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _complain(f"{args.folder}: {error.strerror or error}, expected a directory to write to")
        return 1
    try:
        return fetch_all(args.folder, Source(args.base_url, args.retries), files)
    except KeyboardInterrupt:
        kept = [part for file in files if (part := part_path(args.folder, file)).exists()]
        _complain(f"interrupted; {', '.join(map(str, kept)) or 'nothing'} is kept, the same command goes on from there")
        return 130


if __name__ == "__main__":
    sys.exit(main())
