"""A run: a mean an epoch, then its end. What a run does stands in plan.json under its folder's name, else under "*"."""

import json
import os
import signal
import sys
import time
from pathlib import Path

began = time.time()
resumed = "--resume" in sys.argv
folder = Path(sys.argv[sys.argv.index("--resume" if resumed else "--out") + 1])
plans = json.loads(Path(__file__).with_name("plan.json").read_text())
plan = plans.get(folder.name, plans.get("*", {}))


def stop(*_: object) -> None:
    time.sleep(plan.get("saving", 0))
    print("stopped", flush=True)
    sys.exit(143)


def fail() -> None:
    print("error: " + plan["error"], file=sys.stderr)
    sys.exit(plan["status"])


signal.signal(signal.SIGTERM, stop)
if plan.get("status") == 2:  # bad input, found before anything is written
    fail()
if not resumed:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"argv": sys.argv[1:], "session": os.getsid(0)}))
log = folder / "metrics.jsonl"
done = log.read_text().count("dev") if log.exists() else 0
with log.open("a") as file:
    for epoch, mean in enumerate(plan.get("means", [0.5]), 1):
        if epoch > done:
            record = {"stage": "finetune", "epoch": epoch, "step": epoch, "dev": {"mean": mean}}
            print(json.dumps(record), file=file, flush=True)
        time.sleep(plan.get("pause", 0))
if "error" in plan:
    fail()
life = {"name": folder.name, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": began, "ended": time.time()}
with Path(__file__).with_name("lives.jsonl").open("a") as file:
    print(json.dumps(life), file=file)
results = {"dev": {"mean": max(plan.get("means", [0.5]))}, "argv": sys.argv[1:]}
(folder / "results.json").write_text(json.dumps(results))
