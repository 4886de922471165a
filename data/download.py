"""Fetch the public CS224N files into a directory, checked before they take their names.

    python data/download.py DIR

A transfer that breaks goes on where it stopped, also in a later run; files that are there are checked and never
overwritten. `--base-url` names a mirror.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pooch
import requests

BASE_URL = "https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/main/data"
TIMEOUT = 30.0  # seconds without a byte
RETRIED = (408, 416, 429)  # besides all server errors: request timeout, range not satisfiable, too many requests


class FileError(Exception):
    """One file cannot be had or is not what it should be; the others may be fine. The message is one line."""


@dataclass(frozen=True)
class RemoteFile:
    """A file and how it is recognised: by its SHA-256, or by its columns and number of rows where none is known."""

    name: str
    sha256: str | None = None
    columns: tuple[str, ...] = ()
    num_rows: range = range(0)

    def problem(self, path: Path) -> str | None:
        """What is wrong with a file's content, None if this is the file."""
        if self.sha256 is not None:
            found = pooch.file_hash(path)
            return None if found == self.sha256 else f"SHA-256 is {found}, expected {self.sha256}"
        try:
            header, *rows = path.read_text("utf-8-sig").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            return f"not UTF-8 ({error.reason}), expected a UTF-8 file"
        columns = header.rstrip("\r").split("\t")
        if not set(self.columns) <= set(columns):
            return f"the first line is {' '.join(columns)[:60]!r}, expected the columns {', '.join(self.columns)}"
        if len(rows) not in self.num_rows:
            return f"{len(rows):,} rows, expected {self.num_rows.start:,} to {self.num_rows.stop - 1:,}"
        if rows[-1].count("\t") != len(columns) - 1:
            return f"the last line is cut short, expected {len(columns)} columns"
        return None


QUORA = ("id", "sentence1", "sentence2")
FILES = (
    RemoteFile("ids-sst-train.csv", "03b2b625c090f94a6afd59f114cde5282e2053aab0b101e87ed695d8a0c5b1df"),
    RemoteFile("ids-sst-dev.csv", "a186ce94577635fbe10beaaddd50f16cccf6c30973221cefdf90deed2a584bfe"),
    RemoteFile("ids-sst-test-student.csv", "bdd5a767faa0c26782117e37767ece154c30d5d04fb8727d09c71e3850a55c7b"),
    RemoteFile("quora-train.csv", columns=(*QUORA, "is_duplicate"), num_rows=range(140_000, 143_001)),
    RemoteFile("quora-dev.csv", "bfa3cc954a9ba300ae776a980141de65f622a3c1b97e3fd905d63245bc36d5ad"),
    RemoteFile("quora-test-student.csv", columns=QUORA, num_rows=range(40_000, 41_001)),
    RemoteFile("sts-train.csv", "15d12efc2d656fffb1d61ac1f08ec4227f43925fd16f420c037cbd063699c21b"),
    RemoteFile("sts-dev.csv", "ce3cad6f16062586ac7ba462c28b010a9be10c530fd5074165860d7b7ab4e93d"),
    RemoteFile("sts-test-student.csv", "dee455745b72e9ca3ff74e7c056bd73e34bad5b8d5641045a2c1e7e131866f47"),
)


def transfer(file: RemoteFile, path: Path, url: str, output_file: str, fetcher: Any) -> None:
    """pooch's way to a file, collected in path: an attempt goes on where the last one stopped.

    pooch tries again after a RequestException, but not after a FileError.
    """
    with path.open("ab") as part:
        start = part.tell()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})

        def look_at(response: requests.Response, **_: Any) -> None:
            code, sent = response.status_code, response.headers.get("Content-Range", "")
            if 400 <= code < 500 and code not in RETRIED:
                raise FileError(f"{url}: HTTP {code} {response.reason}; --base-url names another place")
            if code in (200, 206, 416) and sent != f"bytes */{start}" and not sent.startswith(f"bytes {start}-"):
                part.truncate(0)  # from the beginning: the server knows no ranges, or the part is another file's

        asked = {"timeout": TIMEOUT, "headers": headers, "hooks": {"response": look_at}}
        try:
            pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), **asked)(url, part, fetcher)
        except requests.HTTPError as error:
            if error.response is None or error.response.headers.get("Content-Range") != f"bytes */{start}":
                raise  # else nothing was lacking
    if problem := file.problem(path):
        path.unlink()
        raise FileError(f"{url}: {problem}; nothing was kept")
    path.replace(output_file)


def fetch(file: RemoteFile, folder: Path, base_url: str, retries: int) -> str:
    """Makes sure that the file is in the folder; returns how, in words. Raises FileError if another has its name."""
    if os.path.lexists(target := folder / file.name):
        if problem := file.problem(target):
            raise FileError(f"{target}: {problem}; left as it is, move it away to fetch the public file")
        return "already there, verified"
    fetcher = pooch.create(folder, base_url, registry={file.name: file.sha256}, retry_if_failed=retries)
    part = target.with_name(f"{target.name}.part")
    try:
        fetcher.fetch(file.name, downloader=partial(transfer, file, part))
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()
    return "fetched, verified"


def cause(error: BaseException) -> str:
    """What an exception goes back to, in one line."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None, files: Sequence[RemoteFile] = FILES) -> int:
    """The command. Returns its exit code: 0 all files are there, 1 some are not, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="download.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the files go; created if missing")
    parser.add_argument("--base-url", metavar="URL", default=BASE_URL, help=f"default {BASE_URL}")
    parser.add_argument("--retries", metavar="N", type=int, choices=range(11), default=3, help="of a file, default 3")
    args = parser.parse_args(arguments)
    folder, status = args.folder, 0
    pooch.get_logger().setLevel("WARNING")

    def complain(message: str, failed: int = 1) -> None:
        nonlocal status
        print(f"download.py: {message}", file=sys.stderr, flush=True)
        status = failed

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(files, key=lambda file: not os.path.lexists(folder / file.name)):  # checks need no network
            try:
                print(f"{file.name}: {fetch(file, folder, args.base_url, args.retries)}", flush=True)
            except FileError as error:
                complain(str(error))
    except (requests.RequestException, ValueError) as error:  # ValueError: a host name that is none
        complain(
            f"{file.name}: {cause(error)}; try again later to go on from here, name a mirror with --base-url URL, "
            f"or put {', '.join(file.name for file in files)} into {folder} by hand to have them verified"
        )
    except OSError as error:
        complain(f"{error.filename or folder}: {error.strerror or error}, expected a place to write to")
    except KeyboardInterrupt:
        complain("interrupted; what has arrived is kept, the same command goes on from there", failed=130)
    return status


if __name__ == "__main__":
    sys.exit(main())
