"""Fine-tuning: tokens as the tokenizers library cuts them, one suite over small files, resume, staging, own labels."""

import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import checkpoint
import finetune_glue
import glue
from common.options import UserError
from finetune_glue import GlueConfig, encode, load_pretrained, lr_at, main, make_classifier, make_plan, predict, result
from tests.toy import ROOT, VOCAB_SIZE, make_run, make_tokenizer, train_environment
from common.processes import Process

PROCESS = Process(0, 1, torch.device("cpu"), torch.float32)
CPU = ["--device=cpu", "--kernels=torch"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def sentences(n, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(0, 90, rng.integers(3, 12))) for _ in range(n)]


def write_glue(path, tasks=glue.GLUE_TASKS, n=20):
    """Small files in GLUE's layout, with no more columns than are read."""
    for name in tasks:
        task = glue.GLUE_TASKS[name]
        folder = path / task.folder
        folder.mkdir(parents=True)
        for split in ("train", *glue.dev_splits(task)):
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


@pytest.mark.parametrize("limit", [8, 9, 15, 64])
def test_pairs_are_cut_as_by_the_tokenizers_library(pretrained, limit):
    start = load_pretrained(pretrained)
    pairs = list(zip(sentences(60, 3), sentences(60, 4)))
    ours = encode(glue.Examples(pairs), start, limit)
    library = type(start.tokenizer).from_str(start.tokenizer_text)
    ids = [(name, start.special[name]) for name in ("[CLS]", "[SEP]")]
    library.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    library.enable_truncation(limit, strategy="longest_first")
    for i, theirs in enumerate(library.encode_batch(pairs)):
        here = slice(ours.starts[i], ours.starts[i] + ours.lengths[i])
        assert ours.ids[here].tolist() == theirs.ids
        assert ours.types[here].tolist() == theirs.type_ids


def test_suite_of_all_tasks(pretrained, tmp_path):
    results = suite(pretrained, write_glue(tmp_path / "data"), tmp_path / "out")
    assert list(results["tasks"]) == list(glue.GLUE_TASKS) and results["complete"]
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


def write_tests(path, rows):
    """Small test sets in GLUE's layout, of the given numbers of rows."""
    for file, count in rows.items():
        name, split, _ = glue.SUBMISSION[file]
        if name == "wnli":
            continue
        task = glue.AX if name == "ax" else glue.GLUE_TASKS[name]
        columns = ("sentence1", "sentence2") if name == "ax" else task.text_columns
        lines = ["\t".join(["id" if name == "qqp" else "index", *columns])]
        for i, texts in enumerate(zip(*(sentences(count, seed) for seed in range(len(columns))))):
            lines.append("\t".join([str(i), *texts]))
        (path / task.folder).mkdir(exist_ok=True)
        (path / task.folder / ("diagnostic.tsv" if name == "ax" else f"{split}.tsv")).write_text("\n".join(lines) + "\n")


def test_submission_from_training_to_zip(pretrained, tmp_path, monkeypatch):
    rows = {file: 3 + i for i, file in enumerate(glue.SUBMISSION)}  # GLUE's own are up to 390,965
    small = {file: (name, split, rows[file]) for file, (name, split, _) in glue.SUBMISSION.items()}
    monkeypatch.setattr(glue, "SUBMISSION", small)
    data = write_glue(tmp_path / "data")
    write_tests(tmp_path / "data", rows)
    suite(pretrained, data, tmp_path / "out", "--submission", "--seeds=1")
    with zipfile.ZipFile(tmp_path / "out/glue_submission.zip") as archive:
        files = {name: archive.read(name).decode().splitlines() for name in archive.namelist()}
    assert set(files) == {f"{file}.tsv" for file in rows}
    words = {"ax": glue.AX.labels, "wnli": ("0",), **{name: task.labels for name, task in glue.GLUE_TASKS.items()}}
    for file, (name, _, count) in small.items():
        header, *lines = files[f"{file}.tsv"]
        assert header == "index\tprediction" and len(lines) == count
        assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(count)]
        found = {line.split("\t")[1] for line in lines}
        assert all(0 <= float(word) <= 5 for word in found) if name == "stsb" else found <= set(words[name])


def test_training_is_that_of_a_plain_transformers_loop(tmp_path):
    """Eight steps on pairs, dropout off, the same batches: equal losses, and equal weights at the end."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    hf = transformers.BertConfig(vocab_size=VOCAB_SIZE, num_labels=3, attn_implementation="eager", **sizes, **off)
    theirs = transformers.BertForSequenceClassification(hf)
    theirs.save_pretrained(tmp_path)
    make_tokenizer(tmp_path / "tokenizer.json")
    start = load_pretrained(str(tmp_path))
    ours = make_classifier(start, 3, seed=0)
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    pairs = list(zip(sentences(60, 3), sentences(60, 4)))
    encoded = encode(glue.Examples(pairs, np.arange(60) % 3), start, 64)
    settings = glue.Settings(1e-3, 0.1, 16, 2, 1)
    run = finetune_glue.Run(glue.GLUE_TASKS["mnli"], 5, True, "pretrained", settings, 60, 8, 0.0, ())
    train_step = finetune_glue.Steps(ours, settings, PROCESS)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for step, batch in enumerate(finetune_glue.batches(run, encoded, PROCESS.device), 1):
        loss = train_step(lr_at(settings, 8, step), batch)
        flat, cu_seqlens, _, types, _, labels = batch
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        ids, kinds = (
            torch.nn.utils.rnn.pad_sequence(x[: sum(lengths)].long().split(lengths), batch_first=True)
            for x in (flat, types)
        )
        mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
        their_optimizer.param_groups[0]["lr"] = lr_at(settings, 8, step)
        their_loss = theirs(ids, attention_mask=mask.long(), token_type_ids=kinds, labels=labels).loss
        their_loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        torch.testing.assert_close(loss, their_loss.detach(), rtol=0, atol=1e-5)
    for name, weight in checkpoint.weights_of(ours).items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=0, atol=2e-5)


def test_a_task_may_have_its_own_number_of_seeds(pretrained, tmp_path):
    data = write_glue(tmp_path / "data", ("cola", "rte"))
    results = suite(pretrained, data, tmp_path / "out", "--tasks=cola:1,rte")
    assert {name: len(task["scores"]) for name, task in results["tasks"].items()} == {"cola": 1, "rte": 2}
    assert results["tasks"]["cola"]["seeds"] == [19] and results["pretraining"]["budget_minutes"] == 0


def test_tasks_start_from_the_mnli_weights(pretrained, tmp_path, monkeypatch):
    starts = {}
    original = finetune_glue.Worker.classifier

    def recording(worker, run):
        model = original(worker, run)
        starts[run.name] = {name: weight.clone() for name, weight in checkpoint.weights_of(model).items()}
        return model

    monkeypatch.setattr(finetune_glue.Worker, "classifier", recording)
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
    original = finetune_glue.Worker.run
    monkeypatch.setattr(finetune_glue.Worker, "run", lambda w, run, *a: (trained.append(run.name), original(w, run, *a)))
    assert metrics_of(suite(pretrained, data, out, "--tasks=cola,stsb")) == metrics_of(first)
    assert trained == ["cola.seed19"]
    assert metrics_of(suite(pretrained, data, out, "--tasks=cola")) == metrics_of(first)  # stsb's result is kept
    assert trained == ["cola.seed19"]
    with pytest.raises(SystemExit) as status:
        suite(pretrained, data, out, "--tasks=cola,stsb", "--lr=1e-3")
    assert status.value.code == 2 and "another lr" in capsys.readouterr().err


def test_ranks_share_the_runs(pretrained, tmp_path):
    data = write_glue(tmp_path / "data", ("cola", "rte"))
    argv = [f"--checkpoint={pretrained}", f"--data_dir={data}", "--tasks=cola,rte", "--epochs=1", "--seeds=2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "finetune_glue.py"), *argv, f"--out={tmp_path / 'two'}", *CPU]
    done = subprocess.run(command, env=train_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = metrics_of(suite(pretrained, data, tmp_path / "one", "--tasks=cola,rte"))
    assert metrics_of(json.loads((tmp_path / "two/glue.json").read_text())) == alone


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_own_labels_are_learned_and_predicted(pretrained, tmp_path, suffix, capsys):
    def write(path, n, seed):
        texts = sentences(n, seed)
        labels = ["yes" if i % 2 else "no" for i in range(n)]
        rows = [(f"w91 {t}" if label == "yes" else f"w92 {t}", label) for t, label in zip(texts, labels)]
        separator = {"csv": ",", "tsv": "\t"}.get(suffix)
        if suffix == "jsonl":
            lines = [json.dumps({"text": text, "kind": label}) for text, label in rows]
        else:
            lines = [f"text{separator}kind", *(separator.join(row) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
        return path

    train, val = write(tmp_path / f"train.{suffix}", 400, 0), write(tmp_path / f"val.{suffix}", 100, 1)
    out = tmp_path / "out"
    options = [f"--train_file={train}", f"--val_file={val}", "--label_column=kind", "--lr=3e-3", "--epochs=4"]
    main([f"--checkpoint={pretrained}", f"--out={out}", *options, *CPU])
    own = json.loads((out / "glue.json").read_text())["tasks"]["own"]
    assert own["metrics"]["accuracy"]["mean"] > 0.95 and own["metrics"]["macro_f1"]["mean"] > 0.95
    assert own["majority_accuracy"] == 0.5
    assert "classification into no, yes" in capsys.readouterr().out
    main([f"--checkpoint={out}/model", f"--predict_file={val}", f"--out={tmp_path / 'p'}", *CPU])
    predicted = [line.split("\t")[1] for line in (tmp_path / "p/predictions.tsv").read_text().splitlines()[1:]]
    scored = [line.split("\t")[2] for line in (out / "predictions/own.seed19.tsv").read_text().splitlines()[1:]]
    assert predicted == scored


def test_own_numbers_are_regression(pretrained, tmp_path, capsys):
    rows = ["text\tlabel", *(f"{text}\t{len(text) / 7}" for text in sentences(60, 0))]
    (tmp_path / "a.tsv").write_text("\n".join(rows) + "\n")
    options = [f"--train_file={tmp_path}/a.tsv", f"--val_file={tmp_path}/a.tsv", "--random_weights"]
    main([f"--checkpoint={pretrained}", f"--out={tmp_path}/out", *options, *CPU])
    own = json.loads((tmp_path / "out/glue.json").read_text())["tasks"]["own"]
    assert set(own["metrics"]) == {"pearson", "spearman"} and own["init"] == "random"
    assert "regression" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["mosaicbert", "bert"])
def test_examples_do_not_see_each_other(tmp_path, model):
    start = load_pretrained(make_run(tmp_path, model))
    classifier = make_classifier(start, 3, seed=1)
    pairs = list(zip(sentences(30, 5), sentences(30, 6)))
    together = predict(classifier, encode(glue.Examples(pairs), start, 256), PROCESS)
    alone = [predict(classifier, encode(glue.Examples([pair]), start, 256), PROCESS)[0] for pair in pairs]
    np.testing.assert_allclose(together, np.stack(alone), rtol=0, atol=1e-5)


def test_schedule_and_order(pretrained, tmp_path):
    data = write_glue(tmp_path / "data", ("cola",))
    cfg = GlueConfig(checkpoint=pretrained, data_dir=data, tasks="cola", out=str(tmp_path), epochs=3, batch_size=8)
    run = make_plan(cfg, load_pretrained(pretrained))[0]
    assert run.num_steps == 9 and result(cfg, run) is None
    settings = glue.Settings(1e-3, 0.1, 8, 1, 1)
    rates = [lr_at(settings, 100, step) for step in range(1, 101)]
    assert rates[0] == 0 and rates[6] == 1e-3 == max(rates) and rates[-1] == pytest.approx(1e-3 / 94)
    encoded = encode(glue.Examples([(text,) for text in sentences(20, 0)], np.arange(20)), load_pretrained(pretrained), 256)
    labels = [batch[-1].tolist() for batch in finetune_glue.batches(run, encoded, PROCESS.device)]
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
        (["--checkpoint=RUN", "--out=OUT", "--tasks=cola:none"], "'cola:none' is no TASK:SEEDS"),
        (["--checkpoint=RUN", "--out=OUT", "--tasks=cola", "--submission"], "all eight tasks"),
        (["--checkpoint=RUN", "--out=OUT", "--tasks=cola", "--data_dir=nowhere"], "no dev|no train"),
        (["--checkpoint=RUN", "--out=OUT", "--train_file=a.csv"], "together"),
        (["--checkpoint=RUN", "--out=OUT", "--predict_file=a.csv"], "not fine-tuned here"),
        (["--checkpoint=RUN", "--out=OUT", "--jobs=0"], "jobs=0"),
        (["--checkpoint=OUT", "--out=OUT"], "no weights here"),
        (["--checkpoint=OUT/labels", "--out=OUT"], "they are in .*out/labels/model"),
        (["--checkpoint=RUN", "--out=RUN", "--tasks=cola", "--data_dir=GLUE"], "holds a pretraining run"),
    ],
)
def test_mistakes_are_one_line(pretrained, tmp_path, capsys, options, reason):
    places = {"RUN": pretrained, "OUT": str(tmp_path / "out"), "GLUE": str(tmp_path / "glue")}
    (tmp_path / "out" / "labels" / "model").mkdir(parents=True)
    write_glue(tmp_path / "glue", ("cola",))
    with pytest.raises(SystemExit) as status:
        main([re.sub("RUN|OUT|GLUE", lambda match: places[match[0]], option) for option in options] + CPU)
    error = capsys.readouterr().err
    assert status.value.code == 2 and error.count("\n") == 1 and re.search(reason, error), error


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["mosaicbert", "bert"])
def test_captured_steps_are_those_launched_one_by_one(tmp_path, model):
    """Batches of many shapes, dropout off: equal losses and weights. With dropout, every replay draws anew."""
    process = Process(0, 1, torch.device("cuda"), torch.float32)
    settings = glue.Settings(1e-3, 0.1, 16, 6, 1)
    run = finetune_glue.Run(glue.GLUE_TASKS["mnli"], 5, True, "pretrained", settings, 250, 96, 0.0, ())
    start = load_pretrained(make_run(tmp_path / "run", model))
    encoded = encode(glue.Examples(list(zip(sentences(250, 3), sentences(250, 4))), np.arange(250) % 3), start, 64)
    ends = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for use_graphs in (True, False):
            classifier = make_classifier(start, 3, seed=0).cuda().train()
            steps = finetune_glue.Steps(classifier, settings, process)
            train_step = steps if use_graphs else lambda lr, batch: steps.lr.fill_(lr) * 0 + steps.step(batch)
            losses = [
                train_step(lr_at(settings, 96, step), batch)
                for step, batch in enumerate(finetune_glue.batches(run, encoded, process.device), 1)
            ]
            assert (sum(graph is not None for graph in steps.graphs.values()) > 1) == use_graphs
            ends.append((torch.stack(losses), checkpoint.weights_of(classifier)))
        torch.testing.assert_close(*(losses for losses, _ in ends), rtol=1e-4, atol=1e-5)
        for name, weight in ends[0][1].items():
            torch.testing.assert_close(weight, ends[1][1][name], rtol=1e-3, atol=1e-4)

        for module in classifier.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.5
        steps = finetune_glue.Steps(classifier, settings, process)
        batch = encoded.batch(np.arange(16), process.device)
        losses = torch.stack([steps(0.0, batch) for _ in range(6)])
        assert len(losses.unique()) == 6 and steps.graphs


def test_nan_stops_the_suite_with_the_run_named(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune_glue.Steps, "step", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(SystemExit):
        suite(pretrained, write_glue(tmp_path / "data", ("cola",)), tmp_path / "out", "--tasks=cola")
    assert "cola.seed19: loss is nan at step 1" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused(pretrained):
    start = load_pretrained(pretrained)
    tensors = dict(start.tensors)
    tensors.pop("bert.encoder.layer.0.mlp.wo.weight")
    with pytest.raises(UserError, match="missing bert.encoder.layer.0.mlp.wo.weight"):
        make_classifier(finetune_glue.dataclasses.replace(start, tensors=tensors), 2, seed=0)
