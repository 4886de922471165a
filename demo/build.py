"""The page that runs an exported model in a browser: `python -m demo.build RUN/export`.

Writes RUN/export/demo: page/ as it is here, the model, onnxruntime's web build from npm, and the tokenizer as the page
reads it. Any static server shows it; once loaded it needs no network.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from messages import command
from reports.command import Parser, ReportError, run_command
from run_record import read_json

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PAGE = Path(__file__).parent / "page"


def build(export: Path, model: str) -> Path:
    """Writes the folder beside its place and renames it. Returns its path."""
    target = export / "demo"
    if target.exists():
        raise ReportError(f"{target}: exists already, expected a new directory")
    for name in (model, "labels.json", "tokenizer.json"):
        if not (export / name).is_file():
            others = ", ".join(sorted(path.name for path in export.glob("*.onnx")))
            known = f"--model to name one of {others}" if others and name == model else ""
            raise ReportError(f"{export}: no {name}, expected {known or 'a folder that --option export wrote'}")
    with tempfile.TemporaryDirectory(dir=export) as place:
        folder = Path(place) / "demo"
        shutil.copytree(PAGE, folder)
        fetch_runtime(folder)
        settings = page_tokenizer(export) | {"model": model}
        (folder / "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False), "utf-8")
        for name in (model, "labels.json"):
            shutil.copyfile(export / name, folder / name)
        fill_worker(folder)
        os.rename(folder, target)
    return target


def fetch_runtime(folder: Path) -> None:
    """onnxruntime's files by npm, which checks them, out of its settings' registry. Raises ReportError if it cannot."""
    with tempfile.TemporaryDirectory() as place:
        command = ["npm", "pack", RUNTIME, "--silent", "--pack-destination", place]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise ReportError("npm is not installed; the page takes onnxruntime from it (https://nodejs.org)") from None
        except subprocess.CalledProcessError as error:
            reason = " ".join((error.stderr + error.stdout).split())[:200]
            raise ReportError(f"npm does not give {RUNTIME} ({reason})") from None
        with tarfile.open(next(Path(place).glob("*.tgz"))) as archive:
            for name in RUNTIME_FILES:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None
                (folder / name).write_bytes(member.read())


def fill_worker(folder: Path) -> None:
    """Tells the page's service worker what it keeps, and a name that changes with any of it."""
    paths = sorted(path for path in folder.iterdir() if path.name != "sw.js")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    text = (folder / "sw.js").read_text("utf-8").replace("VERSION", digest[:16])
    files = json.dumps(["./", *(path.name for path in paths)])
    (folder / "sw.js").write_text(text.replace("FILES = []", f"FILES = {files}"), "utf-8")


# ---------------------------------------------------------------------------------------------------- the tokenizer


def page_tokenizer(export: Path) -> dict[str, Any]:
    """The tokenizer as page/tokenizer.js reads it. Raises ReportError for one that has no word pieces."""
    from tokenizers import Tokenizer

    labels = read_json(export / "labels.json")
    try:
        tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    except Exception as error:  # the library raises no class of its own
        raise ReportError(f"{export / 'tokenizer.json'}: no tokenizer ({error})") from None
    parts = json.loads(tokenizer.to_str())
    model = parts["model"]
    if model.get("type") != "WordPiece":
        raise ReportError(f"{export / 'tokenizer.json'}: {model.get('type')}, expected the word pieces of a BERT")
    return {
        "pieces": [*model["vocab"].items()],
        "prefix": model["continuing_subword_prefix"],
        "unknown": model["unk_token"],
        "longest_word": model["max_input_chars_per_word"],
        "special": [[token["content"], token["id"]] for token in parts["added_tokens"]],
        "around": labels["special_tokens"],
        "max_length": labels["max_length"],
        "characters": characters(tokenizer),
    }


def characters(tokenizer: Any) -> dict[str, list[Any]]:
    """What becomes of each character before words are cut into pieces, where it does not stay as it is.

    removed, isolated: first and last code points of ranges that vanish, or are a word each. mapped: (character, text).
    """
    kinds: dict[str, list[int]] = {"removed": [], "isolated": []}
    mapped = []
    for point in (*range(0xD800), *range(0xE000, sys.maxunicode + 1)):
        character = chr(point)
        between = tokenizer.normalizer.normalize_str(f"a{character}a")
        found = " ".join(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(between))[1:-1]
        if found in ("", f" {character} "):
            kinds["isolated" if found else "removed"].append(point)
        elif found != character:
            mapped.append([character, found])
    return {**{kind: list(_ranges(points)) for kind, points in kinds.items()}, "mapped": mapped}


def _ranges(points: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each row of neighbours."""
    groups = (list(group) for _, group in groupby(enumerate(points), lambda pair: pair[1] - pair[0]))
    return [(group[0][1], group[-1][1]) for group in groups]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = Parser(prog="python -m demo.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("export", type=Path, help="a folder that --option export wrote")
    parser.add_argument("--model", default="model.int8.onnx", help="its file that the page uses (default: %(default)s)")
    given = parser.parse_args(arguments)

    def make() -> None:
        target = build(given.export, given.model)
        print(f"written; to see it: {command('python', '-m', 'http.server', '--directory', target)}")

    return run_command(make)


if __name__ == "__main__":
    sys.exit(main())
