"""Fine-tuning on GLUE: tokens, training against transformers, a whole suite over small files, MNLI's weights, resume."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import train
from common.glue import GLUE_TASKS, part_of
from common.labelled import Examples
from common.options import UserError
from common.processes import Process
from finetune_glue import (
    GlueConfig,
    Settings,
    Steps,
    Worker,
    batches,
    load_pretrained,
    lr_at,
    main,
    make_classifier,
    make_plan,
    predict,
)
from model import MaskedLM
from tests.ranks import Ranks
from tests.test_train import data_dir  # noqa: F401, a fixture
from tests.toy import VOCAB_SIZE, make_run, make_tokenizer, reseal, toy_argv

PROCESS = Process(0, 1, torch.device("cpu"), torch.float32)
CPU = ["--device=cpu", "--kernels=torch"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def sentences(n, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(0, 90, rng.integers(3, 12))) for _ in range(n)]


def write_glue(path, tasks=GLUE_TASKS, n=20):
    """Small files in GLUE's layout, with no more columns than are read."""
    for name in tasks:
        task = GLUE_TASKS[name]
        folder = path / task.folder
        folder.mkdir(parents=True)
        for split in ("train", *task.dev_splits):
            rows = ["\t".join([*task.text_columns, task.label_column])]
            for i, texts in enumerate(zip(*(sentences(n, seed) for seed in range(len(task.text_columns))))):
                label = task.labels[i % len(task.labels)] if task.labels else str(i % 6)
                rows.append("\t".join([*texts, label]))
            (folder / f"{split.replace('validation', 'dev')}.tsv").write_text("\n".join(rows) + "\n")
    return str(path)


def suite(checkpoint_path, data, out, *options):
    argv = [f"--checkpoint={checkpoint_path}", f"--data_dir={data}", f"--out={out}", "--epochs=1", "--seeds=2"]
    main([*argv, *CPU, *options])
    return json.loads((out / "glue.json").read_text())


def metrics_of(results):
    return {name: task["metrics"] for name, task in results["tasks"].items()}


def kept(first, second, room):
    """How many tokens of two texts `room` holds, the longer one truncated first."""
    if first + second <= room:
        return first, second
    if first > second:
        return room - min(second, room // 2), min(second, room // 2)
    return min(first, room // 2), room - min(first, room // 2)


@pytest.mark.parametrize("limit", [8, 9, 15, 64])
def test_tokens_of_texts_and_pairs(pretrained, limit):
    start = load_pretrained(pretrained, "")
    cls, sep = start.special["[CLS]"], start.special["[SEP]"]
    words = [[[5 + int(word[1:]) for word in text.split()] for text in sentences(60, seed)] for seed in (3, 4)]
    pairs, texts = list(zip(sentences(60, 3), sentences(60, 4))), [(text,) for text in sentences(60, 3)]
    rows, types = [], []
    for first, second in zip(*words):
        one, two = kept(len(first), len(second), limit - 3)
        rows.append([cls, *first[:one], sep, *second[:two], sep])
        types.append([0] * (one + 2) + [1] * (two + 1))
    single = [[cls, *first[: limit - 2], sep] for first in words[0]]
    for examples, rows, types in ((pairs, rows, types), (texts, single, [[0] * len(row) for row in single])):
        encoded = start.encode(Examples(examples, np.arange(60)), limit)
        assert encoded.lengths.tolist() == [len(row) for row in rows]
        for i, begin in enumerate(encoded.starts):
            here = slice(begin, begin + encoded.lengths[i])
            assert encoded.ids[here].tolist() == rows[i] and encoded.types[here].tolist() == types[i]
        batch = encoded.batch(np.array([3, 0, 7]), PROCESS.device)
        flat = rows[3] + rows[0] + rows[7]
        assert batch.input_ids.tolist()[: len(flat)] == flat and not batch.input_ids[len(flat) :].any()
        assert batch.cu_seqlens.tolist() == np.cumsum([0, *map(len, (rows[3], rows[0], rows[7]))]).tolist()
        assert batch.labels.tolist() == [3, 0, 7] and batch.max_seqlen == max(map(len, (rows[3], rows[0], rows[7])))


def test_parts_of_tasks_are_said_everywhere(pretrained, tmp_path, monkeypatch, capsys):
    """All eight tasks with MNLI's staging, from files with a part of the rows, and MNLI's without the mismatched ones."""
    for name, rows in {"mnli": (250, 40), "qnli": (209, 20), "qqp": (182, 34)}.items():
        monkeypatch.setitem(GLUE_TASKS, name, dataclasses.replace(GLUE_TASKS[name], rows=rows))
    for name in ("rte", "sst2", "mrpc", "cola", "stsb"):
        monkeypatch.setitem(GLUE_TASKS, name, dataclasses.replace(GLUE_TASKS[name], rows=(20, 20)))
    data = write_glue(tmp_path / "data")
    (tmp_path / "data" / "MNLI" / "dev_mismatched.tsv").unlink()
    results = suite(pretrained, data, tmp_path / "out", "--seeds=1")
    printed, tasks = capsys.readouterr().out, results["tasks"]
    assert results["complete"] and set(tasks["mnli"]["metrics"]) == {"accuracy_matched"}
    assert [tasks["mnli"][key] for key in ("train_examples", "dev_examples", "official_examples")] == [20, 20, [250, 40]]
    assert {name: part_of(name, task) for name, task in tasks.items() if part_of(name, task)} == {
        "mnli": "8 % of the training data, 50 % of dev", "qnli": "10 % of the training data",
        "qqp": "11 % of the training data, 59 % of dev",
    }  # fmt: skip
    assert {task["init"] for name, task in tasks.items() if name in ("rte", "mrpc", "stsb")} == {"mnli"}
    assert "mnli: 20 examples (8 % of the training data, 50 % of dev), 1 epoch" in printed
    assert "rte: 20 examples, 1 epoch" in printed
    rows = {line.split()[0]: line for line in printed.partition("metrics\n")[2].splitlines()}
    assert rows["qqp"].endswith("; 11 % of the training data, 59 % of dev") and "%" not in rows["rte"]
    assert "average of 8 tasks, 3 of them from a part of GLUE's data: " in printed


def test_suite_of_all_tasks(pretrained, tmp_path):
    results = suite(pretrained, write_glue(tmp_path / "data"), tmp_path / "out")
    assert list(results["tasks"]) == list(GLUE_TASKS) and results["complete"]
    for name, task in results["tasks"].items():
        assert task["init"] == ("mnli" if name in ("rte", "mrpc", "stsb") else "pretrained")
        assert task["seeds"] == [19, 8364] and task["train_examples"] == 20 and task["seconds"] > 0
        scored = [metric for metric in task["metrics"] if not (name == "stsb" and metric == "pearson")]
        for metric in task["metrics"].values():
            assert metric["mean"] == pytest.approx(np.mean(metric["values"])) and len(metric["values"]) == 2
            assert metric["ci95"] == pytest.approx(12.7062 * abs(np.subtract(*metric["values"])) / 2)
        assert task["score"] == pytest.approx(100 * np.mean([task["metrics"][metric]["mean"] for metric in scored]))
    assert set(results["tasks"]["mnli"]["metrics"]) == {"accuracy_matched", "accuracy_mismatched"}
    assert results["average"] == pytest.approx(np.mean([task["score"] for task in results["tasks"].values()]))
    assert results["pretraining"]["gpu_hours"] == 4.0 and results["pretraining"]["dollars"] == 8.0
    lines = (tmp_path / "out/predictions/rte.seed19.tsv").read_text().splitlines()
    assert lines[0] == "index\tlabel\tprediction" and len(lines) == 21
    assert lines[1].split("\t")[:2] == ["0", "entailment"]
    assert (tmp_path / "out/predictions/mnli_mismatched.seed19.tsv").exists()


@pytest.mark.parametrize("family", ["mosaicbert", "bert"])
def test_a_second_text_reads_like_a_first(data_dir, tmp_path, family):  # noqa: F811
    """Pretraining sees one token type, whose vector becomes as long as a word's. The other one was random numbers."""
    argv = toy_argv(data_dir, tmp_path / "run", max_steps=6, lr=0.02, warmup_fraction=0, hidden_dropout=0)
    train.main([*argv, f"--model={family}"])
    step = str(tmp_path / "run" / "step_00000006")
    first, second = checkpoint.read_tensors(step, "model.safetensors")[checkpoint.TOKEN_TYPES]
    assert first.norm() > 0.02 * 32**0.5 and not second.any()

    start = load_pretrained(str(tmp_path / "run"), str(tmp_path / "out"))
    encoded = start.encode(Examples(list(zip(sentences(9, 3), sentences(9, 4)))), 64)
    batch, model = encoded.batch(np.arange(9), PROCESS.device), make_classifier(start, 3, seed=0).eval()
    assert batch.token_type_ids.any()
    expected = model(dataclasses.replace(batch, token_type_ids=torch.zeros_like(batch.token_type_ids)))
    torch.testing.assert_close(model(batch), expected)


def test_token_types_stay_together_in_continued_pretraining(data_dir, tmp_path):  # noqa: F811
    """Also from an export, in which both are alike; those that somebody has trained stay as they are."""
    train.main(toy_argv(data_dir, tmp_path / "run", max_steps=2))
    train.main([*toy_argv(data_dir, tmp_path / "on", max_steps=2), f"--init_from={tmp_path / 'run'}"])
    assert not checkpoint.read_tensors(str(tmp_path / "on" / "step_00000002"), "model.safetensors")[checkpoint.TOKEN_TYPES][1].any()
    own, text = torch.arange(64.0).reshape(2, 32), (tmp_path / "run" / "tokenizer.json").read_text()
    config, tensors, _ = checkpoint.load(str(tmp_path / "run"))
    model = MaskedLM(checkpoint.model_config(config), config["vocab_size"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda path: (config, {**tensors, checkpoint.TOKEN_TYPES: own}, text))
        checkpoint.start_from(model, "theirs", text)
    assert torch.equal(model.bert.embeddings.token_type_embeddings.weight, own)


def test_training_is_that_of_a_plain_transformers_loop(tmp_path):
    """Eight steps on pairs, dropout off, the same batches: equal losses, and equal weights at the end."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    hf = transformers.BertConfig(vocab_size=VOCAB_SIZE, num_labels=3, attn_implementation="eager", **sizes, **off)
    theirs = transformers.BertForSequenceClassification(hf)
    theirs.save_pretrained(tmp_path / "hf")
    make_tokenizer(tmp_path / "hf" / "tokenizer.json")
    start = load_pretrained(str(tmp_path / "hf"), str(tmp_path / "out"))
    assert Path(start.path).match("out/converted_*/step_00000000")
    ours = make_classifier(start, 3, seed=0)
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    pairs = list(zip(sentences(60, 3), sentences(60, 4)))
    encoded = start.encode(Examples(pairs, np.arange(60) % 3), 64)
    settings = Settings(1e-3, 0.1, 16, 2, 1)
    train_step = Steps(ours, settings, PROCESS)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for step, batch in enumerate(batches(encoded, settings, 5, PROCESS.device), 1):
        loss = train_step(lr_at(settings, 8, step), batch)
        lengths = batch.cu_seqlens.diff().tolist()
        ids, kinds = (
            torch.nn.utils.rnn.pad_sequence(x[: sum(lengths)].long().split(lengths), batch_first=True)
            for x in (batch.input_ids, batch.token_type_ids)
        )
        mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
        their_optimizer.param_groups[0]["lr"] = lr_at(settings, 8, step)
        their_loss = theirs(ids, attention_mask=mask.long(), token_type_ids=kinds, labels=batch.labels).loss
        their_loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        torch.testing.assert_close(loss, their_loss.detach(), rtol=0, atol=1e-5)
    for name, weight in checkpoint.weights_of(ours).items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=0, atol=2e-5)


def test_hugging_face_weights_are_converted_once(tmp_path, monkeypatch):
    source, out = tmp_path / "hf", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text("{}")
    calls = []

    def convert(argv, env):
        calls.append(argv[1:])
        out.mkdir(exist_ok=True)
        make_run(Path(argv[-1].removeprefix("--out=")))
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(subprocess, "run", convert)
    first, second = (load_pretrained(str(source), str(out)) for _ in range(2))
    (run,) = out.glob("converted_*")
    assert calls == [["-m", "tools.convert_hf", f"--from_hf={source}", f"--out={run}"]]
    assert first.digest == second.digest
    next(run.glob("step_*/model.safetensors")).write_bytes(b"")
    with pytest.raises(UserError, match=f"{run}: damaged .remove it, and the same command converts {source} again"):
        load_pretrained(str(source), str(out))
    (source / "config.json").write_text("{ }")
    load_pretrained(str(source), str(out))
    assert len(list(out.glob("converted_*"))) == len(calls) == 2


@pytest.mark.parametrize(
    "model, config, options, says",
    [
        ("bert", {"seq_length": 6}, [], True),
        ("mosaicbert", {"seq_length": 6}, [], False),
        ("bert", {"seq_length": 6}, ["--max_length=6"], False),
        ("bert", {"seq_length": 6}, ["--random_weights"], False),
        ("bert", {"seq_length": 6, "init_from": "out/bert"}, [], False),
        ("bert", {}, [], False),  # as of converted weights
    ],
)
def test_positions_that_were_never_trained(tmp_path, capsys, model, config, options, says):
    run = Path(make_run(tmp_path / "run", model), "step_00000001")
    (run / "config.json").write_text(json.dumps({**json.loads((run / "config.json").read_text()), **config}))
    reseal(run)
    data = write_glue(tmp_path / "data", ("cola",))
    suite(str(run), data, tmp_path / "out", "--tasks=cola:1", *options)
    text = "warning: cola: BERT's positions from 7 to [0-9]+ were never trained .--max_length=6 stays within the trained ones."
    assert bool(re.search(text, capsys.readouterr().out)) == says


def test_a_task_may_have_its_own_number_of_seeds(pretrained, tmp_path):
    data = write_glue(tmp_path / "data", ("cola", "rte"))
    results = suite(pretrained, data, tmp_path / "out", "--tasks=CoLA:1,rte")
    assert {name: len(task["scores"]) for name, task in results["tasks"].items()} == {"cola": 1, "rte": 2}
    assert results["tasks"]["cola"]["seeds"] == [19] and results["pretraining"]["budget_minutes"] == 0


def test_tasks_may_be_called_as_their_folders():
    tasks = GlueConfig(checkpoint="run", out="out", tasks=",".join(task.folder for task in GLUE_TASKS.values())).seeds_of_tasks()
    assert list(tasks) == list(GLUE_TASKS)


def test_tasks_start_from_the_mnli_weights(pretrained, tmp_path, monkeypatch):
    starts = {}
    original = Worker.classifier

    def recording(worker, run):
        model = original(worker, run)
        starts[run.name] = {name: weight.clone() for name, weight in checkpoint.weights_of(model).items()}
        return model

    monkeypatch.setattr(Worker, "classifier", recording)
    data = write_glue(tmp_path / "data", ("mnli", "rte"))
    suite(pretrained, data, tmp_path / "out", "--tasks=rte,mnli")
    tuned = checkpoint.read_tensors(checkpoint.find(str(tmp_path / "out/mnli")), "model.safetensors")
    for name, weight in starts["rte.seed8364"].items():
        assert torch.equal(weight, tuned[name]) == (not name.startswith("classifier")), name
    assert not torch.equal(tuned["bert.pooler.dense.weight"], starts["mnli.seed19"]["bert.pooler.dense.weight"])
    assert suite(pretrained, data, tmp_path / "alone", "--tasks=rte")["tasks"]["rte"]["init"] == "pretrained"


def test_goes_on_where_it_was_and_jobs_do_not_matter(pretrained, tmp_path, monkeypatch, capsys):
    data = write_glue(tmp_path / "data", ("cola", "stsb"))
    out = tmp_path / "out"
    first = suite(pretrained, data, out, "--tasks=cola,stsb", "--jobs=2")
    assert metrics_of(suite(pretrained, data, tmp_path / "other", "--tasks=cola,stsb")) == metrics_of(first)

    log = out / "runs/cola.seed19.jsonl"  # as a kill leaves it
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + '\n{"event": "en')
    trained = []
    original = Worker.run
    monkeypatch.setattr(Worker, "run", lambda w, run, *a: (trained.append(run.name), original(w, run, *a)))
    assert metrics_of(suite(pretrained, data, out, "--tasks=cola,stsb")) == metrics_of(first)
    assert trained == ["cola.seed19"]
    assert metrics_of(suite(pretrained, data, out, "--tasks=cola")) == metrics_of(first)  # stsb's result is kept
    assert trained == ["cola.seed19"]
    with pytest.raises(SystemExit) as status:
        suite(pretrained, data, out, "--tasks=cola,stsb", "--lr=1e-3")
    assert status.value.code == 2 and "different lr" in capsys.readouterr().err


def test_ranks_share_the_runs(pretrained, tmp_path):
    data = write_glue(tmp_path / "data", ("cola", "rte"))
    argv = [f"--checkpoint={pretrained}", f"--data_dir={data}", "--tasks=cola,rte", "--epochs=1", "--seeds=2"]
    ranks = Ranks([*argv, f"--out={tmp_path / 'two'}", *CPU], 2, tmp_path / "output", script="finetune_glue")
    assert ranks.wait() == [0, 0], ranks.output()
    alone = metrics_of(suite(pretrained, data, tmp_path / "one", "--tasks=cola,rte"))
    assert metrics_of(json.loads((tmp_path / "two/glue.json").read_text())) == alone


@pytest.mark.parametrize("model", ["mosaicbert", "bert"])
def test_examples_do_not_see_each_other(tmp_path, model):
    start = load_pretrained(make_run(tmp_path, model), "")
    classifier = make_classifier(start, 3, seed=1)
    pairs = list(zip(sentences(30, 5), sentences(30, 6)))
    together = predict(classifier, start.encode(Examples(pairs), 256), PROCESS)
    alone = [predict(classifier, start.encode(Examples([pair]), 256), PROCESS)[0] for pair in pairs]
    np.testing.assert_allclose(together, np.stack(alone), rtol=0, atol=1e-5)


def test_schedule_and_order(pretrained, tmp_path):
    data = write_glue(tmp_path / "data", ("cola",))
    cfg = GlueConfig(checkpoint=pretrained, data_dir=data, tasks="cola", out=str(tmp_path), epochs=3, batch_size=8)
    run = make_plan(cfg, load_pretrained(pretrained, ""))[0]
    assert run.num_steps == 9 and (run.settings.epochs, run.settings.batch_size) == (3, 8)
    settings = Settings(1e-3, 0.1, 8, 1, 1)
    rates = [lr_at(settings, 100, step) for step in range(1, 101)]
    assert rates[0] == 0 and rates[6] == 1e-3 == max(rates) and rates[-1] == pytest.approx(1e-3 / 94)
    encoded = load_pretrained(pretrained, "").encode(Examples([(text,) for text in sentences(20, 0)], np.arange(20)), 256)
    labels = [batch.labels.tolist() for batch in batches(encoded, run.settings, run.seed, PROCESS.device)]
    epochs = [sum(labels[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_dry_run_writes_nothing(pretrained, tmp_path, capsys):
    data = write_glue(tmp_path / "data", ("cola",))
    out = tmp_path / "out"
    main([f"--checkpoint={pretrained}", f"--data_dir={data}", "--tasks=cola", f"--out={out}", "--dry_run", *CPU])
    printed = capsys.readouterr().out
    assert "cola" in printed and "ms/step" in printed and "min on one" in printed and not out.exists()


@pytest.mark.parametrize(
    "options, reason",
    [
        ([], "--checkpoint: not given"),
        (["--checkpoint=RUN"], "--out: not given"),
        (["--checkpoint=RUN", "--out=OUT", "--tasks=colla"], "no task 'colla'"),
        (["--checkpoint=RUN", "--out=OUT", "--tasks=cola:none"], "'cola:none' is not TASK:SEEDS"),
        (["--checkpoint=RUN", "--out=OUT", "--tasks=cola", "--data_dir=nowhere"], "no dev|no train"),
        (["--checkpoint=RUN", "--out=OUT", "--train_file=a.csv"], "--train_file: unknown option"),
        (["--checkpoint=RUN", "--out=OUT", "--jobs=0"], "jobs=0"),
        (["--checkpoint=OUT", "--out=OUT"], "no weights here"),
        (["--checkpoint=RUN", "--out=RUN", "--tasks=cola", "--data_dir=GLUE"], "holds a pretraining run"),
    ],
)
def test_mistakes_are_one_line(pretrained, tmp_path, capfd, options, reason):
    places = {"RUN": pretrained, "OUT": str(tmp_path / "out"), "GLUE": str(tmp_path / "glue")}
    (tmp_path / "out").mkdir()
    write_glue(tmp_path / "glue", ("cola",))
    with pytest.raises(SystemExit) as status:
        main([re.sub("RUN|OUT|GLUE", lambda match: places[match[0]], option) for option in options] + CPU)
    error = capfd.readouterr().err
    assert status.value.code == 2 and error.count("\n") == 1 and re.search(reason, error), error


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["mosaicbert", "bert"])
def test_captured_steps_are_those_launched_one_by_one(tmp_path, model):
    """Batches of many shapes, dropout off: equal losses and weights. With dropout, every replay draws anew."""
    process = Process(0, 1, torch.device("cuda"), torch.float32)
    settings = Settings(1e-3, 0.1, 16, 6, 1)
    start = load_pretrained(make_run(tmp_path / "run", model), "")
    encoded = start.encode(Examples(list(zip(sentences(250, 3), sentences(250, 4))), np.arange(250) % 3), 64)
    ends = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for use_graphs in (True, False):
            classifier = make_classifier(start, 3, seed=0).cuda().train()
            steps = Steps(classifier, settings, process)
            train_step = steps if use_graphs else lambda lr, batch: steps.lr.fill_(lr) * 0 + steps.step(batch)
            losses = [
                train_step(lr_at(settings, 96, step), batch)
                for step, batch in enumerate(batches(encoded, settings, 5, process.device), 1)
            ]
            assert (sum(graph is not None for graph in steps.graphed.graphs.values()) > 1) == use_graphs
            ends.append((torch.stack(losses), checkpoint.weights_of(classifier)))
        torch.testing.assert_close(*(losses for losses, _ in ends), rtol=1e-4, atol=1e-5)
        for name, weight in ends[0][1].items():
            torch.testing.assert_close(weight, ends[1][1][name], rtol=1e-3, atol=1e-4)

        for module in classifier.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.5
        steps = Steps(classifier, settings, process)
        batch = encoded.batch(np.arange(16), process.device)
        losses = torch.stack([steps(0.0, batch) for _ in range(6)])
        assert len(losses.unique()) == 6 and steps.graphed.graphs


def test_nan_stops_the_suite_with_the_run_named(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Steps, "step", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(SystemExit):
        suite(pretrained, write_glue(tmp_path / "data", ("cola",)), tmp_path / "out", "--tasks=cola")
    assert "cola.seed19: loss is nan at step 1" in capsys.readouterr().err


def test_a_model_that_has_not_learned_is_named(pretrained, tmp_path, monkeypatch, capsys):
    """MNLI after eight minutes of fast.py with 6e-5: a plain 35.4, and weights from which MRPC and STS-B started."""
    constant = lambda model, encoded, process: np.eye(2)[[1] * len(encoded.lengths)]  # noqa: E731
    monkeypatch.setattr("finetune_glue.predict", constant)
    data = write_glue(tmp_path / "data", ("cola",))
    suite(pretrained, data, tmp_path / "out", "--tasks=cola:1")
    said = capsys.readouterr().out
    assert "warning: cola.seed19: predicts '1' for every example (it has not learned; try a longer warm-up" in said
    monkeypatch.setattr("finetune_glue.predict", lambda *args: np.eye(2)[np.arange(len(args[1].lengths)) % 2])
    suite(pretrained, data, tmp_path / "other", "--tasks=cola:1")
    assert "has not learned" not in capsys.readouterr().out


def test_a_classifier_that_is_left_out_is_said(pretrained, tmp_path, capsys):
    """finetune_own said so, and finetune_glue.py called it pretrained."""
    data = write_glue(tmp_path / "data", ("mnli", "rte"))
    suite(pretrained, data, tmp_path / "out", "--tasks=mnli:1")
    assert "left out" not in capsys.readouterr().out
    suite(tmp_path / "out/mnli", data, tmp_path / "other", "--tasks=rte:1")
    says = f"{tmp_path}/out/mnli: fine-tuned on labels entailment, neutral, contradiction before: that classifier is left"
    assert capsys.readouterr().out.count(says) == 1


def test_weights_that_do_not_fit_are_refused(pretrained):
    start = load_pretrained(pretrained, "")
    tensors = dict(start.tensors)
    tensors.pop("bert.encoder.layer.0.mlp.wo.weight")
    with pytest.raises(UserError, match="missing bert.encoder.layer.0.mlp.wo.weight"):
        make_classifier(dataclasses.replace(start, tensors=tensors), 2, seed=0)
