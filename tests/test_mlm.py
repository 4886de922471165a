"""Masked-language modelling: what is masked, a stage against transformers' own model, and what a run has of it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import multitask_classifier
import run as running
from bert import CheckpointError
from checkpoints import load_huggingface, save_checkpoint
from datasets import RowStream, TokenizedRows, Tokenizer, TokenRows
from engine import Stage
from evaluation import Precision
from helpers import Capture, Patch, generator, randomize_vectors, tiny_config, tiny_model, write_data, write_vocabulary
from mlm import MLM, MaskedLanguageModel, make_masked_head, mask_pieces, masked_trainer
from model import MultitaskBert
from ops import DropoutMasks, PackedTokens, TokenStore
from seeding import derive_seed
from tasks import TASKS

CPU = torch.device("cpu")
CLS, SEP, MASK, SPECIAL = 2, 3, 4, 5  # ids below SPECIAL are special tokens, ids from 90 on are in no tokenizer
IDS = dict(zip(("PAD", "UNK", "CLS", "SEP", "MASK"), range(SPECIAL), strict=True))
TOKENIZER: Any = SimpleNamespace(special_ids=lambda: IDS, vocab_size=90)
IS_PIECE = torch.tensor([SPECIAL <= i < 90 for i in range(100)])


def rows_of(task: str, num_rows: int, seed: int) -> TokenizedRows:
    """[CLS], 4 to 12 ids of which some are special, [SEP]."""
    draw = np.random.default_rng(seed)
    rows = [[CLS, *draw.integers(1, 90, draw.integers(4, 13)), SEP] for _ in range(num_rows)]
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = TokenRows(np.concatenate(rows).astype(np.int32), lengths, lengths // 2)
    labels = np.zeros(num_rows, np.float64)
    return TokenizedRows(TASKS[task], [str(i) for i in range(num_rows)], labels, tokens, CPU)


# ------------------------------------------------------------------------------------------------------- masking


def many_tokens() -> PackedTokens:
    """90,000 ids of all kinds in rows of 9, then places that belong to no row and hold a piece's id."""
    ids = np.random.default_rng(0).integers(0, 90, 90_000)
    tokens = TokenStore.of(ids, np.full(10_000, 9), np.full(10_000, 9)).gather(torch.arange(10_000), 100_000)
    tokens.input_ids[90_000:] = 50
    return tokens


def test_of_the_pieces_15_percent_are_chosen_and_special_tokens_and_places_without_a_row_never() -> None:
    tokens = many_tokens()
    before = tokens.input_ids.clone()
    masked, chosen = mask_pieces(tokens, IS_PIECE, MASK, generator())
    assert len(chosen) / int((before[:90_000] >= SPECIAL).sum()) == pytest.approx(0.15, abs=0.005)
    assert (before[chosen] >= SPECIAL).all() and (chosen < 90_000).all() and len(chosen.unique()) == len(chosen)
    others = torch.ones(100_000, dtype=torch.bool)
    others[chosen] = False
    assert torch.equal(masked.input_ids[others], before[others]) and torch.equal(tokens.input_ids, before)
    now, then = masked.input_ids[chosen], before[chosen]
    assert float((now == MASK).float().mean()) == pytest.approx(0.8, abs=0.015)
    assert float((now == then).float().mean()) == pytest.approx(0.1 + 0.1 / 85, abs=0.01)
    changed = now[(now != MASK) & (now != then)]
    assert changed.unique().tolist() == list(range(SPECIAL, 90))
    assert float(changed.float().mean()) == pytest.approx(47, abs=2)  # as of uniform ones


def test_a_pass_masks_by_the_seed_of_its_dropout_and_one_without_pieces_has_no_loss(tiny: Path) -> None:
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    head, is_new = make_masked_head(model.encoder.config, tiny, 0)
    masked, batch = MaskedLanguageModel(model.encoder, head, TOKENIZER), rows_of("sst", 30, 1).batch(range(30))
    first, again, other = (masked(MLM, batch, DropoutMasks(seed)) for seed in (1, 1, 2))
    assert is_new and torch.equal(first, again) and not torch.equal(first, other)
    assert batch.tokens is not None
    batch.tokens.input_ids.fill_(CLS)
    assert not masked(MLM, batch, DropoutMasks(0)).any()


def test_special_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    folder = write_vocabulary(tmp_path / "folder")
    assert Tokenizer(folder, 9).special_ids() == IDS
    path = folder / "vocab.txt"
    path.write_text(path.read_text().replace("[MASK]", "mask"))
    with pytest.raises(CheckpointError, match=r"no token \[MASK\]"):
        Tokenizer(folder, 9).special_ids()


# --------------------------------------------------------------------------------------------- against transformers


@pytest.fixture
def float64(monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def write_reference(folder: Path) -> tuple[transformers.BertForMaskedLM, MultitaskBert]:
    """transformers' masked language model, random, its checkpoint, and ours with its encoder. No dropout."""
    rates: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    values = {**tiny_config(**rates).to_dict(), "initializer_range": 0.3}
    reference = transformers.BertForMaskedLM(transformers.BertConfig(**values, attn_implementation="eager"))
    randomize_vectors(reference, 0)
    reference.save_pretrained(folder)
    model = tiny_model(**rates).to(torch.get_default_dtype())
    assert load_huggingface(model.encoder, reference.state_dict(), "here") == ["pooler.weight", "pooler.bias"]
    return reference, model


def padded(tokens: PackedTokens, *values: Tensor) -> list[Tensor]:
    """Of each (N,) a tensor (B, L), filled up with zeros."""
    rows = [list(value[: tokens.num_tokens].split(tokens.packing.lengths.tolist())) for value in values]
    return [nn.utils.rnn.pad_sequence(of, batch_first=True) for of in rows]


def reference_output(reference: nn.Module, tokens: PackedTokens, labels: Tensor) -> Any:
    """Of transformers' model. labels: (N,), 0 where there is none."""
    real = torch.ones_like(tokens.input_ids)
    ids, types, real, labels = padded(tokens, tokens.input_ids, tokens.token_type_ids, real, labels)
    return reference(ids, token_type_ids=types, attention_mask=real, labels=labels.where(labels > 0, -100))


@pytest.mark.usefixtures("float64")
def test_logits_are_those_of_transformers_and_a_head_that_is_not_whole_is_one_line(tmp_path: Path) -> None:
    reference, model = write_reference(tmp_path)
    head, is_new = make_masked_head(model.encoder.config, tmp_path, 0)
    tokens, chosen = rows_of("sst", 5, 1).batch(range(5)).tokens, torch.tensor([1, 2, 9, 20, 30])
    assert tokens is not None and not is_new
    real = torch.ones_like(tokens.input_ids)
    expected = reference_output(reference, tokens, real).logits[padded(tokens, real)[0].bool()]  # (N, V)
    found = MaskedLanguageModel(model.encoder, head, TOKENIZER).logits(tokens, chosen)
    assert torch.allclose(found, expected[chosen], rtol=0, atol=1e-9)
    path = tmp_path / "model.safetensors"
    save_file({n: v for n, v in load_file(path).items() if n != "cls.predictions.bias"}, path)
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.bias is missing"):
        make_masked_head(model.encoder.config, tmp_path, 0)


def naive_loss(reference: nn.Module, rows: TokenizedRows, numbers: np.ndarray, step: int, first: int) -> Tensor:
    """transformers' loss of the rows of a pass, which are the step's from this one on."""
    tokens = rows.batch(numbers).tokens
    assert tokens is not None
    seed = derive_seed(derive_seed(3, MLM, "dropout", step, MLM, first), MLM)
    masked, chosen = mask_pieces(tokens, IS_PIECE, MASK, generator(seed))
    labels = torch.zeros_like(tokens.input_ids)
    labels[chosen] = tokens.input_ids[chosen]
    return reference_output(reference, masked, labels).loss  # type: ignore[no-any-return]


@pytest.mark.usefixtures("float64")
def test_a_stage_takes_the_steps_of_a_naive_one_and_moves_encoder_and_head_alone(tmp_path: Path) -> None:
    """The naive one trains transformers' model, padded, with torch's optimizer. Two passes of 7 and 7 rows a step."""
    reference, model = write_reference(tmp_path)
    head, _ = make_masked_head(model.encoder.config, tmp_path, 0)
    kept = {name: value.clone() for name, value in model.state_dict().items() if "pooler" in name or "heads" in name}
    train = {"sst": rows_of("sst", 20, 1), "para": rows_of("para", 15, 2)}
    stage = Stage(MLM, (MLM,), 3, 2, 7, 2, 1e-3, 0.4, 0.1, 0.5, 1, 1, 8, seed=3)
    trainer = masked_trainer(stage, model, head, TOKENIZER, train, Precision(CPU))
    matrices, vectors = ([p for p in reference.parameters() if (p.dim() > 1) == is_one] for is_one in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])
    rows, losses = train["sst"].followed_by(train["para"]), []
    stream = RowStream(len(rows), derive_seed(3, MLM, "rows", MLM))
    for event in trainer.run():
        assert event.record is not None and not event.is_best
        if event.is_epoch:
            assert event.record["mean_loss"] == pytest.approx(np.mean(losses[-2:]), abs=1e-9)
            continue
        step = len(losses)
        parts = stream.rows(step * 14, 14).reshape(2, 7)
        of_parts = [naive_loss(reference, rows, part, step, 7 * i) for i, part in enumerate(parts)]
        loss = torch.stack(of_parts).mean()
        losses.append(float(loss.detach()))
        assert [event.record["loss"], event.record["losses"][MLM]] == [pytest.approx(losses[-1], abs=1e-9)] * 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate(step)
        optimizer.step()
        theirs = reference.state_dict()
        expected = tiny_model().double()
        load_huggingface(expected.encoder, theirs, "here")
        ours, expected_state = model.encoder.state_dict(), expected.encoder.state_dict()
        assert [n for n in ours if "pooler" not in n and not near(ours[n], expected_state[n])] == []
        assert [n for n, p in head.named_parameters() if not near(p, theirs[f"cls.predictions.{n}"])] == []
    assert len(losses) == 6 and all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())


def test_each_sentence_of_a_split_pair_is_a_row(tiny: Path) -> None:
    model, pairs = tiny_model(), rows_of("para", 15, 2)
    head, _ = make_masked_head(model.encoder.config, tiny, 0)
    pairs.tokens = replace(pairs.tokens, is_split=True)
    stage, train = Stage(MLM, (MLM,), 1, 1, 7, 1, 1e-3, 0.4, 0.1, 0.5, 1, 1, 8, seed=3), {"sst": rows_of("sst", 20, 1)}
    trainer = masked_trainer(stage, model, head, TOKENIZER, {**train, "para": pairs}, Precision(CPU))
    assert len(trainer.data.train[MLM]) == 20 + 2 * 15


def near(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-7, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def arguments(tiny: Path, tmp_path: Path) -> Any:
    """Of a short run into a directory of this name."""

    def arguments(name: str, data: Path, flags: str) -> list[str]:
        more = "--mlm_epochs 2 --mlm_lr 1e-3 --steps_per_epoch 3 --batch_size 4 --pretrain_epochs 1"
        place = f"--model {tiny} --data {data} --out {tmp_path / name} --device cpu --cache off --no-tensorboard"
        return f"{place} {more} {flags}".split()

    return arguments


def test_the_stage_runs_first_is_told_and_leaves_an_encoder_that_dev_and_test_rows_have_no_part_in(
    arguments: Any, tiny: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = write_data(tmp_path / "data")
    for path in (*other.glob("*-dev.csv"), *other.glob("*-test-student.csv")):
        path.write_text(path.read_text().replace(" ", " film "))
    for name, folder in (("first", data), ("second", other)):
        assert multitask_classifier.main(arguments(name, folder, "--option pretrain --batch_size 26")) == 0
    first, second = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("first", "second"))
    before = load_file(tiny / "model.safetensors")
    encoder = [name for name in before if "pooler" not in name]
    assert all(torch.equal(first[name], second[name]) for name in encoder)
    assert not any(torch.equal(first[name], before[name]) for name in encoder if "attention.self.key.bias" not in name)
    assert all(torch.equal(first[name], before[name]) for name in before if "pooler" in name)
    shown = capsys.readouterr().out
    assert "mlm         2 epochs of 3 steps of 26 rows, learning rate 0.001, its head is dropped afterwards" in shown
    assert "mlm: transform and output bias are new" in shown and "mlm epoch 2/2: mean loss 3." in shown


def test_a_run_records_it_and_while_it_runs_has_a_checkpoint_for_transformers_with_the_head(
    arguments: Any, data: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    saved, save = [], running.Run.save

    def save_and_load(run: running.Run, *given: Any) -> None:
        save(run, *given)
        saved.append({name for name in load_file(run.directory.last / "model.safetensors") if name.startswith("cls.")})
        if saved[-1]:
            _, info = transformers.BertForMaskedLM.from_pretrained(run.directory.last, output_loading_info=True)
            assert not info["missing_keys"]

    monkeypatch.setattr(running.Run, "save", save_and_load)
    assert multitask_classifier.main(arguments("run", data, "--pcgrad --epochs 2")) == 0
    assert [len(names) for names in saved] == [5, 5, 0, 0, 0, 0, 0]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seconds"]["training"] > results["seconds"]["mlm"] > 0 and results["best_epoch"] in (1, 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [
        (line["epoch"], line["step"], "loss" in line, "mean_loss" in line) for line in lines if line["stage"] == MLM
    ]
    steps = [[(e, s, True, False) for s in range(3 * e - 2, 3 * e + 1)] + [(e, 3 * e, False, True)] for e in (1, 2)]
    assert found == [*steps[0], *steps[1]]
    assert "4 draws" not in capsys.readouterr().out.split("mlm  ")[1].split("\n")[0]


def test_an_encoder_whose_top_layers_are_the_tasks_is_refused_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    model = tiny_model(copied=1)
    folder, words = tmp_path / "copied", write_vocabulary(tmp_path / "words")
    folder.mkdir()
    save_checkpoint(model, words, folder)
    flags = f"--option pretrain --mlm_epochs 1 --checkpoint {folder} --data {write_data(tmp_path / 'data')}"
    assert multitask_classifier.main([*flags.split(), "--out", str(tmp_path / "run"), "--cache", "off"]) != 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--mlm_epochs 1" in line and "top 1 layers" in line
    assert not (tmp_path / "run").exists()
