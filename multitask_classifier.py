"""Trains one BERT for three language tasks: flags become objects, objects become stages, stages fill a run directory.

python multitask_classifier.py --option finetune --scheduler pal --pcgrad
"""

import random
import signal
import sys

if __name__ == "__main__":  # a Ctrl-C while modules are loaded ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from collections.abc import Sequence

import numpy as np
import torch

from bert import CheckpointError
from config import Config, FlagError, parse
from console import Console
from datasets import DataError, OutputError
from distributed import ALONE, ProcessGroup
from engine import TrainingError
from evaluation import Precision
from export import ExportError, export
from messages import ensure_output, machine_failure, print_error
from prediction import PredictionError, predict_lines
from predictor import Predictor, load
from run import AMP, Run, Stopped, StopSignals, default_eval_batch_size, prepare, resolve_device
from run_record import RunError

USER_ERRORS = (
    *(FlagError, DataError, OutputError, CheckpointError, RunError),
    *(TrainingError, PredictionError, ExportError),
)


def predict(config: Config) -> int:
    """`--option predict`: lines in, predictions out, no run. Returns the exit status."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    precision = Precision(torch.device(device), AMP[config.amp])

    def make_predictor() -> Predictor:
        batch_size = config.eval_batch_size or default_eval_batch_size(device)
        return load(config.checkpoint, device, batch_size, config.max_length, precision.autocast)

    return predict_lines(make_predictor, config.task, config.input, config.output, config.names)


def execute(config: Config, console: Console, processes: ProcessGroup) -> int:
    """Runs to the end or to a stop; returns the exit status."""
    if config.option in ("predict", "export") and processes.size > 1:
        raise FlagError(f"--option {config.option}: {processes.size} processes, expected one, without torchrun")
    if config.option == "predict":
        return predict(config)
    if config.option == "export":
        if config.threads:
            torch.set_num_threads(config.threads)
        return export(config, console)
    stop = StopSignals(processes)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    run: Run | None = None
    try:
        run = prepare(config, console, stop, processes)
        run.train()
        run.finish()
        return 0
    except Stopped:
        assert run is not None
        console.say(f"stopped; to go on: {stop.way}")
        processes.leave()
        return stop.status
    except Exception as error:
        if run is not None and machine_failure(error):
            error.add_note(f"; to go on: {stop.way}")
        raise
    finally:
        stop.restore()
        if run is not None:
            run.tracking.finish({})
            run.directory.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 1 for a run that failed, 2 for bad input, 128 + signal when stopped."""
    processes = ALONE
    try:
        processes = ProcessGroup.join()
        ensure_output(processes.is_first)
        config = parse(sys.argv[1:] if arguments is None else arguments)
        return execute(config, Console(processes.is_first), processes)
    except KeyboardInterrupt:
        if processes.is_first_to_tell():
            print("stopped at once", file=sys.stderr)
        return 130
    except Exception as error:
        is_input = isinstance(error, USER_ERRORS)
        if not is_input and not machine_failure(error):
            raise
        if processes.is_first_to_tell():
            print_error(error)
        return 2 if is_input and not isinstance(error, TrainingError) else 1


if __name__ == "__main__":
    # The moments of words that have not been seen for 800 steps are too small for normal numbers, and a processor takes
    # ten times as long for them. It has to be said before there are threads.
    torch.set_flush_denormal(True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what is half-written is removed
    sys.exit(main())
