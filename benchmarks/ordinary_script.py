"""The start of an ordinary fine-tuning script with transformers: what `start_up` compares with.

    python -m benchmarks.ordinary_script DATA CHECKPOINT OUT

Reads and tokenizes all files, loads the encoder, takes one optimizer step on 32 rows, writes OUT/done and ends. Nothing
of ours is in it but the names of files and columns.
"""

import csv
import sys
from pathlib import Path

import torch
import transformers

from tasks import TASKS, Task


def read_texts(path: Path, task: Task) -> list[list[str]]:
    """One list a text column."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [[row[column] or "" for row in rows] for column in task.text_columns]


def main(data: str, checkpoint: str, out: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    encoder = transformers.BertModel.from_pretrained(checkpoint, attn_implementation="sdpa", local_files_only=True)
    longest = encoder.config.max_position_embeddings
    encodings = {}
    for task in TASKS.values():
        for split in ("train", "dev", "test"):
            path = Path(data) / task.file_name(split)
            if path.exists():
                texts = read_texts(path, task)
                encodings[task.name, split] = tokenizer(*texts, truncation=True, max_length=longest)
    head = torch.nn.Linear(encoder.config.hidden_size, 1)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    encoder.train()
    chosen = encodings["para", "train"]
    rows = torch.randperm(len(chosen["input_ids"]))[:32].tolist()
    batch = tokenizer.pad({name: [chosen[name][row] for row in rows] for name in chosen}, return_tensors="pt")
    loss = head(encoder(**batch).pooler_output).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    Path(out).mkdir()
    (Path(out) / "done").write_text("step")


if __name__ == "__main__":
    main(*sys.argv[1:])
