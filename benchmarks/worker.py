"""The process of one checkout for compare.py, which starts it; what it imports are that checkout's modules.

Reads lines "KIND NUMBER", takes step NUMBER of that kind and answers "done". It keeps to what the checkouts have in
common, older ones included.
"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import workload
from evaluation import predict_logits

torch.set_flush_denormal(True)
checkpoint = workload.Checkpoint.find(sys.argv[2])
train_rows = checkpoint.rows(Path(sys.argv[1]), "train")
predicted_rows = workload.subset(train_rows, 1200)


@cache
def step_of(kind: str) -> Callable[[int], Any]:
    model = checkpoint.model(tuple(train_rows))
    if kind == "prediction":
        return lambda number: [predict_logits(model, t, of, 64, workload.CPU) for t, of in predicted_rows.items()]
    options: dict[str, Any] = {"draws_per_step": 3, "treatment": "pcgrad"} if kind == "pcgrad" else {}
    trainer = workload.full_trainer(model, train_rows, **options)
    return lambda number: trainer.take_step(1, number)


for line in sys.stdin:
    name, step = line.split()
    step_of(name)(int(step))
    print("done", flush=True)
