"""README, docs/ and results/: links lead somewhere, commands and options exist, and every figure stands in a log."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from common import estimate
from common.options import UserError, load_config
from studies import race, scaling
from tests.test_race import write_race
from tools.figures import reading
from train import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for folder in ("docs", "results") for path in (ROOT / folder).glob("*.md"))]
SCRIPTS = [path for folder in (".", "configs", "kernels", "tools", "studies") for path in sorted((ROOT / folder).glob("*.py"))]


def text_of(page):
    return (ROOT / page).read_text()


def flat(page):
    """A page's text on one line, however it is wrapped."""
    return " ".join(text_of(page).split())


def section(page, title):
    """The part of a page under a heading of level 2."""
    found = text_of(page).partition(f"\n## {title}\n")[2]
    assert found, f"{page}: no section {title!r}"
    return found.partition("\n## ")[0]


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 200


def commands(text):
    """The commands in indented lines and between backticks, each as a list of words; a backslash continues a line."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^ {4,}((?:python|torchrun|make) .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines + re.findall(r"`((?:python|torchrun|make) [^`]*)`", text)]


def options(module):
    """The option names of a script: the fields of its last dataclass of options; None if it has none."""
    found = [
        value for name, value in vars(importlib.import_module(module)).items()
        if name.endswith("Config") and dataclasses.is_dataclass(value) and value.__module__ == module
    ]  # fmt: skip
    return {field.name for field in dataclasses.fields(found[-1])} if found else None


def check_command(words):
    """Asserts that the script, the files and the options of a command exist."""
    if words[0] == "make":
        assert words[1] in re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE), words[1]
        return
    if "-m" in words:
        module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        if module == "pytest":
            assert not [word for word in rest if word.endswith(".py") and not (ROOT / word).exists()]
            return
        path = module.replace(".", "/") + ".py"
    else:
        path = next(word for word in words[1:] if word.endswith(".py"))
        module, rest = path.removesuffix(".py"), words[words.index(path) + 1 :]
    if not path.endswith("NAME.py"):
        assert (ROOT / path).exists(), path
        names = options(module)
        for word in rest if names else ():
            if word.startswith("--"):
                assert word[2:].partition("=")[0].replace("-", "_") in names, f"{path} {word}"
            else:
                assert (ROOT / word).exists(), f"{path} {word}"
    if module == "studies.race":
        compared([word.replace("configs/mine.py", "configs/base.py") for word in rest])


def compared(words):
    """What each run of a race's command would train with: {name: TrainConfig}."""
    cfg = load_config(race.RaceConfig, [word.replace("configs/", f"{ROOT}/configs/") for word in words])
    runs = race.parse_runs(cfg) if cfg.runs else []
    return {run.name: load_config(TrainConfig, race.pretrain_command(cfg, run)[1:]) for run in runs}


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_exists(page):
    for words in commands(text_of(page)):
        check_command(words)


def test_commands_in_docstrings_name_what_exists():
    found = 0
    for path in SCRIPTS:
        for words in commands(ast.get_docstring(ast.parse(path.read_text())) or ""):
            check_command(words)
            found += 1
    assert found > 30


@pytest.mark.parametrize("text", [
    "    python train.py configs/base.py --no_such_option=1",
    "    python train.py configs/missing.py",
    "    python missing.py",
    "    torchrun --nproc_per_node=2 \\\n        train.py --missing",
    "run `python -m tools.plot --los=out` now",
    "    python -m tools.missing",
    "    python -m pytest tests/test_missing.py",
    "    make missing",
    "    python -m studies.race --runs='configs/base.py 2 --missing=1'",
])  # fmt: skip
def test_a_wrong_command_would_be_seen(text):
    (words,) = commands(text)
    with pytest.raises((AssertionError, StopIteration, UserError)):
        check_command(words)


def test_names_in_files_exist():
    """Where a page says `name` in file.py, the file defines it."""
    found = [pair for page in PAGES for pair in re.findall(r"`(\w+)` in (\w[\w/]*\.py)", flat(page))]
    assert len(found) > 3
    for name, path in found:
        assert re.search(rf"^(def {name}\(|class {name}\b|{name}\b.* = )", text_of(path), re.MULTILINE), (name, path)


def test_the_file_tree_is_complete():
    """The README's tree has every script, and nothing else."""
    folder, named = "", set()
    for line in section("README.md", "File structure").partition("```")[2].partition("```")[0].splitlines():
        names = re.split(r" {2,}", line.lstrip("├│└─ "))[0]
        if line.startswith(("├", "└")):
            folder = names if names.endswith("/") else ""
        inside = folder if line.startswith("│") else ""
        named |= {inside + name for name in names.split(", ")} - {""}
    assert not [name for name in named if not (ROOT / name).exists()]
    scripts = {str(path.relative_to(ROOT)) for path in SCRIPTS if path.name != "__init__.py"}
    assert {name for name in named if name.endswith(".py")} == scripts


def test_every_log_is_explained():
    text = text_of("results/README.md")
    assert not [path.name for path in (ROOT / "results").glob("*.jsonl") if f"## {path.name}" not in text]


def test_figures_are_those_of_the_log():
    records = [json.loads(line) for line in (ROOT / "results" / "base_wikipedia_h100.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "train"][1:]  # the first one compiles kernels
    # The speeds in this log leave out waiting for the GPU, which `seconds` does not: see results/README.md.
    pairs = [
        (before, record) for before, record in zip(records, records[1:]) if before["event"] == record["event"] == "train"
    ]
    speed = median((b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairs[1:])
    right = speed / median(record["tokens_per_second"] for record in steps)
    held_out, end = [record for record in records if record["event"] == "eval"][-1], records[-1]
    figures = [
        f"{held_out['loss']:.3f}",
        f"{100 * held_out['accuracy']:.1f} %",
        f"{100 * held_out['majority_accuracy']:.1f} %",
        f"{round(speed, -3):,.0f} tokens/s",
        f"{round(right * median(record['samples_per_second'] for record in steps), -1):,.0f} samples/s",
        f"{100 * right * median(record['mfu'] for record in steps):.1f} %",
        f"{100 * right * median(record['mfu_6n'] for record in steps):.1f} %",
        f"{end['seconds']:.0f} s",
        f"${end['dollars']:.2f}",
    ]
    text = section("docs/results.md", "Eight minutes of MosaicBERT-Base")
    assert end["event"] == "end" and not [figure for figure in figures if figure not in text]


@pytest.mark.parametrize("recipe", ["mosaic", "fast"])
def test_glue_scores_are_those_of_the_runs(recipe):
    results = json.loads((ROOT / "results" / "glue_h100" / recipe / "glue.json").read_text())
    row = next(line for line in section("docs/results.md", "GLUE").splitlines() if line.startswith(f"| `{recipe}`"))
    tasks = [results["tasks"][name] for name in ("cola", "sst2", "mrpc", "stsb", "rte")]
    assert row.split(" | ")[1:] == [f"{task['score']:.2f} ± {task['score_ci95']:.2f}" for task in tasks][:-1] + [
        f"{tasks[-1]['score']:.2f} ± {tasks[-1]['score_ci95']:.2f} |"
    ]
    for task in tasks:  # and each score is the mean of what every seed's run logged
        assert task["score"] == pytest.approx(sum(task["scores"]) / len(task["scores"]))


def test_comparison_with_transformers_is_that_of_the_runs():
    compared = json.loads((ROOT / "results" / "glue_h100" / "minilm" / "compare.json").read_text())
    text = text_of("results/README.md")
    for name, result in compared.items():
        ours, theirs = (100 * sum(result[who]) / len(result[who]) for who in ("ours", "transformers"))
        assert f"| {ours:.2f} | {theirs:.2f} | {abs(result['difference_points']):.2f} ± {result['ci95_points']:.2f} |" in text


def missing(lines, text):
    """Lines that a page lacks; with a single other digit a line is another one."""
    return [line for line in lines if line not in text.splitlines()]


def test_race_is_that_of_the_runs():
    """The README has the race's table line by line; docs/ has the spread behind its interval, and how late budgets ended."""
    assert not missing(race.results_text(str(ROOT / "results" / "race")), text_of("README.md"))
    runs = race.read_runs(str(ROOT / "results" / "race"))
    (spread,) = race.factors(runs).values()
    assert spread["df"] == 4 and f"the four pairs of seeds: by {spread['sd']:.1f} points" in flat("docs/results.md")
    late = [100 * (run["seconds"] / (60 * run["minutes"]) - 1) for run in runs]
    assert f"from {-min(late):.1f} % early to {max(late):.1f} % late" in flat("docs/training.md")


def test_both_models_race_alike_but_for_what_is_documented():
    """By docs/results.md's command they differ in architecture, masking, attention dropout, compile, BERT's smaller batch and
    learning rate, and the steps in a quarter of the time."""
    (words,) = [words for words in commands(section("docs/results.md", "MosaicBERT against BERT")) if "studies.race" in words]
    (again,) = [words for words in commands(section("results/README.md", "race/")) if f"--runs={words[-1][7:]}" in words]
    runs = compared(words[3:])
    assert words == again and len(runs) == 12
    for minutes in (2, 4, 8):
        ours, theirs = (vars(runs[f"{name}_{minutes}min_seed17"]) for name in ("base", "bert_base"))
        assert {name for name, value in ours.items() if theirs[name] != value} == {
            "model", "mask_prob", "attention_dropout", "compile", "out_dir", "global_batch_size", "lr", "warmup_steps"
        }  # fmt: skip
        assert [(cfg["global_batch_size"], cfg["lr"]) for cfg in (ours, theirs)] == [(512, 5e-4), (256, 2.5e-4)]


def test_budgets_are_those_of_the_runs():
    """results/README.md "budgets_h200": steps, their median time, and when each run ended; docs/training.md has the range."""
    text, early = text_of("results/README.md"), []
    for path in (ROOT / "results" / "budgets_h200").glob("*.jsonl"):
        records = reading.read_log(path)
        steps = [record for record in records if record["event"] == "train"][1:]
        config, end = records[0]["config"], records[-1]
        milliseconds = 1e3 * config["global_batch_size"] / median(record["samples_per_second"] for record in steps)
        early.append(100 - 100 * end["seconds"] / (60 * config["budget_minutes"]))
        (row,) = [line for line in text.splitlines() if f"(budgets_h200/{path.name})" in line]
        assert f"| {end['step']:,} steps, " in row and end["event"] == "end" and end["step"] == config["max_steps"]
        assert f", {milliseconds:.2f} | {end['seconds']:.1f} s | {early[-1]:.1f} % early |" in row
    assert len(early) == 6 and f"from {min(early):.1f} % to {max(early):.1f} % early" in flat("docs/training.md")


def test_recipe_trials_are_what_was_logged():
    """results/README.md "recipe_h200": each held-out loss, every fine-tuning score, and each step's time."""
    folder, text = ROOT / "results" / "recipe_h200", section("results/README.md", "recipe_h200/")
    (*_, long) = [r for r in reading.read_log(folder / "long_512_1e-3.jsonl") if r["event"] == "eval"]
    assert f"held-out loss of {long['loss']:.3f}" in " ".join(text.split())
    for path in set(folder.glob("*e-*.jsonl")) | {folder / "short_three_iterations.jsonl"}:
        records = reading.read_log(path)
        loss = [record["loss"] for record in records if record["event"] == "eval"][-1]
        (row,) = [line for line in text.splitlines() if f"(recipe_h200/{path.name})" in line]
        if row.startswith("|"):
            assert f"| {loss:.3f} |" in row
        if row.count("|") == 7:
            assert f"| {records[-1]['step']:,} |" in row
    cells, start = {}, None
    for line in (folder / "finetuning.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "start":
            start = record["identity"]
        elif record["event"] == "end":
            values = [value for name, value in record["metrics"].items() if name != "pearson"]
            key = (record["model"], start["task"], start["dropout"], start["warmup_fraction"], start["lr"])
            cells.setdefault(key, []).append(100 * sum(values) / len(values))
    rows = [("muon_1e-3", 0.06, 0.1), ("muon_1e-3_dropout", 0.06, 0.1), ("adamw_1e-3_dropout", 0.06, 0.1)]
    rows += [("muon_5e-4", 0.06, 0.1), ("long_512_1e-3", 0.06, 0.1), ("long_512_1e-3", 0.25, 0.1), ("long_512_1e-3", 0.25, 0.0)]
    usual = {"cola": 7e-5, "mrpc": 8e-5, "stsb": 3e-5}
    rows = [(*row, usual) for row in rows] + [("long_512_1e-3", 0.25, 0.1, dict.fromkeys(usual, 3e-5))]
    for model, warmup, dropout, rates in rows:
        found = [cells.get((model, task, dropout, warmup, rate), []) for task, rate in rates.items()]
        # Two processes had the same settings for STS-B, and the same score: it is shown once.
        assert " | ".join(", ".join(dict.fromkeys(f"{value:.1f}" for value in values)) for values in found) in text
    for path, counts in (("first", [128]), ("", [256, 4096]), ("512", [512])):
        times = json.loads((folder / f"small_steps{'_' * bool(path)}{path}.json").read_text())["rows"]
        for count in counts:
            row = [f"{result['ms']:.2f} ms" for result in times if result["samples"] == count]
            (line,) = [line for line in text.splitlines() if line.startswith(f"| [{count:,}](recipe")]
            assert [cell for cell in re.findall(r"[\d.]+ ms", line)] == row


def test_lengths_are_those_of_the_runs():
    """Each loss in docs/training.md's table, of four minutes of fast.py and of the race's 8 minutes, and those in docs/results.md."""
    losses = {}
    for model, title in (("mosaicbert", "base.py"), ("bert", "BERT")):
        runs = json.loads((ROOT / "results" / "race" / f"{model}_8min_seed17" / "lengths.json").read_text())["lengths"]
        losses[title] = [f"{result['loss']:.3f}" for result in runs.values()]
    for line in text_of("results/recipe_h200/four_minutes_lengths.txt").splitlines():
        title = "fast.py, continued at 512" if line.startswith("continued") else "fast.py"
        losses.setdefault(title, []).append(f"{float(re.search('loss ([0-9.]+)', line)[1]):.3f}")
    rows = dict(re.findall(r"^\| (.*?) \| (\d\.\d+ .*) \|$", section("docs/training.md", "Longer sequences"), re.MULTILINE))
    assert {title: re.findall(r"\d\.\d{3}", row) for title, row in rows.items()} == losses
    ours = section("results/README.md", "recipe_h200/").splitlines()
    for title, name in (("trained at 128", "fast.py"), ("continued at 512", "fast.py, continued at 512")):
        assert f"| {title} | {' | '.join(losses[name])} |" in ours
    sentence = text_of("docs/results.md").partition("**Longer texts.**")[2].partition("([table]")[0]
    shown = [losses["base.py"][i] for i in (0, 2, 3)] + [losses["BERT"][i] for i in (0, 2)]
    assert re.findall(r"\d\.\d{3}", sentence) == shown


def test_token_types_are_what_was_logged():
    """results/README.md "token_types_h200": losses, scores, lengths of vectors, the CPU's losses; and docs/training.md's seconds."""
    folder, text = ROOT / "results" / "token_types_h200", section("results/README.md", "token_types_h200/")
    last, seconds = {}, {}
    for name in ("four", "eight", "seventeen"):
        records = reading.read_log(folder / f"{name}_minutes.jsonl")
        last[name] = [record for record in records if record["event"] == "eval"][-1]
        seconds[name] = {record["step"]: record["seconds"] for record in records if record["event"] in ("train", "end")}
        (row,) = [line for line in text.splitlines() if line.startswith("|") and f"({folder.name}/{name}_minutes.jsonl)" in line]
        assert f"| {last[name]['step']:,} | {last[name]['loss']:.3f} |" in row
        if name != "four":
            scores = {}
            log = text_of(f"results/{folder.name}/seventeen_minutes_glue.txt")
            for task, metrics in re.findall(r"^(\w+)\.seed\d+: (.*) in ", log, re.MULTILINE):
                values = [float(value) for metric, value in re.findall(r"(\w+) (-?[\d.]+)", metrics) if metric != "pearson"]
                scores.setdefault(task, []).append(np.mean(values))
            if name == "eight":
                tasks = reading.read_glue(folder / "eight_minutes_glue.json")["tasks"]
                scores = {task: result["scores"] for task, result in tasks.items()}
            cells = [f"{np.mean(scores[task]):.1f}" for task in race.COLUMNS]
            assert row.endswith(f"| {' | '.join(cells)} |")
    assert f"(the other four have {np.mean([score for score in scores['cola'] if score]):.1f})" in text
    words = text_of(f"results/{folder.name}/norms.txt").split("\n", 2)[2].replace("[", " ").replace("]", " ").split()
    for minutes, at in (("4", 0), ("8", 8), ("17", 16)):
        first, second, median_word = float(words[at + 1]), float(words[at + 2]), float(words[at + 5])
        assert f"| {minutes} minutes | {first:.2f} | {second:.2f} | {median_word:.2f} |" in text
    records = reading.read_log(folder / "seventeen_minutes.jsonl")
    level = {record["step"]: record["loss"] for record in records if record["event"] == "eval"}
    assert f"takes the loss from {level[10350]:.3f} to {level[12938]:.3f}" in text
    cpu, words = text_of(f"results/{folder.name}/cpu.txt"), " ".join(text.split())
    alone, second, copied = (
        float(re.search(rf"^{row}, --lr=1e-4: accuracy (.*)$", cpu, re.MULTILINE)[1])
        for row in ("alone", "second text, type 1 as trained", "second text, type 1 a copy")
    )
    assert f"{alone:.2f} % right if they stand alone, {second:.2f} % if" in words and f"and {copied:.2f} % if type 1" in words
    for rate in ("3e-5", "1e-5"):
        values = (re.search(rf"type 1 {how}, --lr={rate}: accuracy (.*)$", cpu, re.MULTILINE)[1] for how in ("as trained", "a copy"))
        assert "{} % instead of {} %".format(*values) in words
    one, two = re.search(r"^as trained: (4.*), (5.*)$", cpu, re.MULTILINE).groups()
    assert f"from {float(one):.2f} to {float(two):.2f}" in words
    losses = [json.loads(line) for line in text_of("results/recipe_h200/schedules_cpu.jsonl").splitlines()]
    wsd, linear = (
        [f"{record['loss']:.3f}" for record in losses if record["schedule"] == schedule and record["step"] == 1500]
        for schedule in ("wsd", "linear")
    )
    assert f"{' and '.join(wsd)} (seeds 17 and 18) instead of {' and '.join(linear)}" in " ".join(text.split())
    assert f"{seconds['four'][2875] - seconds['four'][2300]:.0f} seconds" in flat("docs/training.md")


def test_equal_minutes_are_what_was_logged():
    """results/README.md "equal_minutes_h200" and docs/results.md: losses, seconds, scores, trials, weights; the wsd run's loss."""
    folder, text = ROOT / "results" / "equal_minutes_h200", section("results/README.md", "equal_minutes_h200/")
    scores, weights = {}, text_of(f"results/{folder.name}/weights.txt")
    for line in text_of(f"results/{folder.name}/finetuning.jsonl").splitlines():
        record = json.loads(line)
        if record["event"] == "end":
            values = [value for metric, value in record["metrics"].items() if metric != "pearson"]
            task = record["run"].partition(".")[0]
            scores.setdefault(record["model"], {}).setdefault(task, []).append(100 * np.mean(values))
    for name, title in (("fast_4", "fast.py, 4 minutes"), ("fast_8", "fast.py, 8 minutes"), ("base_8", "base.py, 8 minutes")):
        records = reading.read_log(folder / f"{name}.jsonl")
        loss, end = [record["loss"] for record in records if record["event"] == "eval"][-1], records[-1]
        of = weights.split(f"{name}min")[1].split("min types")[0]
        kind = re.search(r"types \[([\d.]+)", of)[1]
        rms = ", ".join(f"{float(re.search(rf'layer.{layer}.mlp.gated.* rms ([0-9.]+)', of)[1]):.3f}" for layer in (6, 11))
        row = f"| [{title}](equal_minutes_h200/{name}.jsonl) | {end['step']:,} | {end['seconds']:.1f} | ${end['dollars']:.2f} | {loss:.3f} |"
        assert row in text and f"| {float(kind):.2f} | {rms} |" in text
        cells = [f"{np.mean(scores[name][task]):.1f}" if task in scores[name] else "" for task in race.COLUMNS]
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
        assert [cell.strip(" ()") for cell in row.split("|")[2:-1]] == cells
        (row,) = [line for line in text_of("docs/results.md").splitlines() if line.startswith(f"| {title} | $")]
        shown = [cell.strip() for cell in row.split("|")[2:-1]]
        assert shown[:2] == [f"${end['dollars']:.2f}", f"{loss:.3f}"]
        assert all(cell in ("", right) for cell, right in zip(shown[2:], cells))
    cpu = text_of(f"results/{folder.name}/weight_decay_cpu.txt")
    models = re.findall(r"^(\w+, weight decay [\d.]+): ([\d.]+), [\d.]+, ([\d.]+)$", cpu, re.MULTILINE)
    assert len(models) == 4
    for kind, loss, rms in models:
        kind = kind.replace("weight decay ", "")
        tuned = {rate: float(score) for rate, score in re.findall(rf"^{kind}, lr (\S+): ([\d.]+),", cpu, re.MULTILINE)}
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {kind} |")]
        cells = [float(cell) for cell in row.split("|")[2:-1] if cell.strip()]
        assert np.allclose(cells, [float(rms), float(loss), *tuned.values()], atol=0.0501) and f"{float(loss):.3f}" in row
    wsd = [r["loss"] for r in reading.read_log(ROOT / "results/token_types_h200/four_minutes.jsonl") if r["event"] == "eval"][-1]
    assert f"2.462 instead of {wsd:.3f}" in text
    trials = dict(re.findall(r"^(fast_\dmin: \S+)\n((?:    .*\n)+)", text_of(f"results/{folder.name}/trials.txt"), re.MULTILINE))
    for start, trial in (("| fast.py, 4 minutes: what", "fast_4min: usual"), ("| 6e-5", "fast_4min: 6e-5"), ("| 3e-5", "fast_4min: 3e-5"),
                         ("| fast.py, 8 minutes: 6e-5", "fast_8min: 6e-5")):  # fmt: skip
        (row,) = [line for line in text.splitlines() if line.startswith(start)]
        cells = [float(re.search(rf"^ +{task} +([\d.]+)", trials[trial], re.MULTILINE)[1]) for task in ("mnli", "qnli", "qqp", "sst2")]
        assert np.allclose([float(cell) for cell in row.split("|")[2:-1]], cells, atol=0.0501)


def test_four_minutes_are_what_was_logged():
    """results/README.md "recipe_h200": the rows of fast.py with and without dropout; and the config's own figures."""
    folder, text = ROOT / "results" / "recipe_h200", section("results/README.md", "recipe_h200/")
    about = " ".join((ROOT / "configs" / "fast.py").read_text().split())
    for scores, log in (("four_minutes_glue",) * 2, ("four_minutes_glue_dropout", ""), ("four_minutes_dropout_glue",) * 2):
        tasks = reading.read_glue(folder / f"{scores}.json")["tasks"]
        cells = [f"{tasks[t]['score']:.1f} ({np.std(tasks[t]['scores'], ddof=1):.1f})" for t in ("cola", "sst2", "mrpc", "stsb")]
        (row,) = [line for line in text.splitlines() if f"](recipe_h200/{scores}.json) |" in line]
        assert row.endswith(f"| {' | '.join(cells)} | {np.mean([task['score'] for task in tasks.values()]):.1f} |")
        if log:
            records = reading.read_log(folder / f"{log.removesuffix('_glue')}.jsonl")
            loss, end = [record["loss"] for record in records if record["event"] == "eval"][-1], records[-1]
            assert f"| {end['step']:,} | {loss:.3f} |" in row
            assert f"{end['seconds']:.1f}" in text and f"{loss:.3f}" in about
            for task in ("cola", "stsb"):
                assert f"{tasks[task]['score']:.1f}" in about
    cfg = load_config(TrainConfig, [f"{ROOT}/configs/fast.py"])
    start = reading.read_log(folder / "four_minutes.jsonl")[0]["config"]
    differing = {name for name, value in vars(cfg).items() if start[name] != value}
    assert differing <= {"data_dir", "out_dir", "max_steps", "budget_minutes", "eval_interval", "log_interval", "checkpoint_interval",
                         "keep_checkpoints", "price_per_gpu_hour"}  # fmt: skip


def test_plateau_on_a_cpu_is_that_of_the_logs():
    text = text_of("results/README.md")
    steps = 500, 1000, 1500, 2000, 4000
    for title, model, count in (("BERT", "bert", 5), ("MosaicBERT", "mosaicbert", 4)):
        records = reading.read_log(ROOT / "results" / "race_settings" / f"{model}_cpu.jsonl")
        losses = {record["step"]: f"{record['loss']:.3f}" for record in records if record["event"] == "eval"}
        row = re.search(rf"^\| \[{title}\]\(race_settings/{model}_cpu.jsonl\) \|(.*)$", text, re.MULTILINE)[1]
        assert re.findall(r"[\d.]+", row) == [losses[step] for step in steps[:count]]


def test_a_wrong_number_of_the_race_would_be_seen(tmp_path):
    lines = race.results_text(str(write_race(tmp_path)))
    assert len(lines) == 2 + 6 + 2 and not missing(lines, "\n".join(lines))
    for i, line in enumerate(lines):
        for match in re.finditer(r"\d", line):  # every digit
            wrong = line[: match.start()] + str((int(match[0]) + 1) % 10) + line[match.end() :]
            assert missing(lines, "\n".join([*lines[:i], wrong, *lines[i + 1 :]])) == [line]


def test_speeds_are_those_of_the_benchmark():
    """docs/speed.md: each peer's samples/s and factor, beside what this project did in the same run."""
    text = text_of("docs/speed.md")
    shown = re.findall(r"^\| .* \| ([\d,]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    entries = {}
    for name in ("bench", "bench_others", "bench_512", "bench_large"):
        for row in json.loads((ROOT / "results" / "kernels_h100" / f"{name}.json").read_text())["rows"]:
            entries.setdefault((name, row["row"], row["entry"]), row)
    tuned = [entries["bench", "step_full", name] for name in ("flex_t2", "varlen_t2")]
    others = ("padded_t1", "flex_default", "padded_default", "bert_default")
    peers = tuned + [entries["bench_others", "step_full", name] for name in others]
    assert shown == [(f"{row['samples_per_second']:,.0f}", f"{row['ours_faster']:.2f}") for row in peers]
    for key in (
        ("bench", "step_full", "ours"), ("bench", "step_fill80", "ours"), ("bench", "step_fill80", "varlen_t2"),
        ("bench_512", "step_512", "ours"), ("bench_512", "step_512", "varlen_t2"),
        ("bench_large", "step_large", "ours"), ("bench_large", "step_large", "flex_t2"),
    ):  # fmt: skip
        assert f"{entries[key]['samples_per_second']:,.0f}" in text, key


def attention_times():
    """{lengths: {(kernel or "together", variant): ns per token}}, from the log of all variants."""
    times = {}
    for part in text_of("results/attention_h200/variants.txt").split("=== lengths ")[1:]:
        found = times[part.partition(":")[0]] = {}
        for line in re.findall(r"^  .*ns .*$", part.partition("\nsummary")[0], re.MULTILINE):
            kernel, name = line.split()[0], re.split(" {2,}", line[37:])[0]
            found[kernel, name] = float(line.split()[1])
            if alone := re.search(r"forward alone ([\d.]+)", line):
                found["forward", name] = float(alone[1])
    return times


def test_attention_is_what_was_measured():
    """results/README.md "attention_h200" and docs/speed.md: each row of their tables."""
    text, short = section("results/README.md", "attention_h200"), section("docs/speed.md", "129 to 2,048 tokens")
    all_times = attention_times()
    winners = [("forward", "forward 64x64 w4 s3 tma"), ("dq", "dq 64x64 w4 s3 tma"), ("dkv", "dkv 32x64 w4 s3 tma")]
    assert list(all_times) == ["512", "2048", "ragged", "1024", "256"]
    for lengths, times in all_times.items():
        forward, dq, dkv = (times[winner] for winner in winners)
        before, both = times["together", "TREE"], times["together", "best at 512"]
        varlen, flex = (times.get(("together", name)) for name in ("varlen_attn, no bias", "FlexAttention, ALiBi"))
        title = f"{int(lengths):,}" if lengths.isdecimal() else lengths
        cells = f"| {title} | {times['forward', 'TREE']:.2f}, {forward:.2f} | {times['both', 'TREE backward']:.2f}, {dq + dkv:.2f} |"
        cells += f" {before:.2f}, {both:.2f} | {times['forward', 'varlen_attn, no bias']:.2f}, {varlen:.2f} |"
        cells += f" {f'{flex:.2f}' if flex else '–'} | {before / both:.2f}, {varlen / both:.2f}, {f'{flex / both:.2f}' if flex else '–'} |"
        assert cells in text.splitlines()
        row = f"| {title} | {both:.2f} | {before:.2f} | {varlen:.2f} | {f'{flex:.2f}' if flex else 'not measured'} |"
        assert (row in short.splitlines()) == (lengths in ("256", "1024"))
        assert lengths == "ragged" or f" | {before:.2f} | " in short
    dropped = re.findall(r"^\| .* \| `((\w+?) .*)` \| (.*) \| (.*) \| (.*), (.*) \|$", text, re.MULTILINE)
    assert len(dropped) == 9
    now = {kernel: [f"{all_times[n][kernel, name]:.2f}" for n in ("512", "2048")] for kernel, name in winners}
    now["both"] = [f"{sum(all_times[n][winner] for winner in winners[1:]):.2f}" for n in ("512", "2048")]
    now["tree_forward"] = [f"{all_times[n]['forward', 'TREE']:.2f}" for n in ("512", "2048")]
    for name, kernel, *figures in dropped:
        tried = [f"{all_times[n][kernel.removeprefix('tree_'), name]:.2f}" for n in ("512", "2048")]
        assert figures == tried + now[kernel], name
    order = [("dq", "tree_dq 128x64 w8 s1"), ("dkv", "tree_dkv 32x128 w8 s1")]
    parts = [all_times[n][variant] for n in ("512", "2048") for variant in order]
    assert "take {:.2f} + {:.2f} and {:.2f} + {:.2f}".format(*parts) in " ".join(text.split())


def test_attention_and_steps_are_those_of_the_benchmark():
    """The same pages: the kernels as they are, and whole steps."""
    rows = json.loads(text_of("results/attention_h200/bench.json"))["rows"]
    found = {(row["row"], row["entry"]): row for row in rows}
    text, short = section("results/README.md", "attention_h200"), section("docs/speed.md", "129 to 2,048 tokens")
    for n in (512, 2048):
        ours, varlen, flex = (found[f"attention_{n}", entry] for entry in ("ours", "varlen", "flex"))
        times = ", ".join(f"{ours[part]['ns_per_token']:.2f}" for part in ("forward", "backward", "both"))
        peers = " | ".join(f"{peer['both']['ns_per_token']:.2f}" for peer in (varlen, flex))
        assert f"| {n:,} | {times} | {peers} | {varlen['ours_faster']:.2f}, {flex['ours_faster']:.2f} |" in text
        assert re.search(rf"^\| {n:,} \| {ours['both']['ns_per_token']:.2f} \| [\d.]+ \| {re.escape(peers)} \|$", short, re.M)
    rate = {key: row["samples_per_second"] for key, row in found.items() if key[0].startswith("step")}
    base, fp8, peer = (rate["step_512", entry] for entry in ("ours", "fp8", "varlen_t2"))
    long, other, large = rate["step_2048", "ours"], rate["step_2048", "varlen_t2"], found["step_large_512", "ours"]
    assert f"| Base, 512 tokens | {base:,.0f} | {fp8:,.0f} | {peer:,.0f} | {base / peer:.2f}, in FP8 {fp8 / peer:.2f} |" in text
    assert f"| Base, 2,048 tokens | {long:.1f} | | {other:.1f} | {long / other:.2f} |" in text
    assert f"| {large['samples_per_second']:.1f} ({large['mfu']:.1%} MFU) |".replace("%", " %") in text
    assert f"| {base:,.0f} ({base / peer:.2f} times as fast) | {fp8:,.0f} ({fp8 / peer:.2f}) | {peer:,.0f} |" in short
    assert f"| {long:.0f} ({long / other:.2f}) | not measured | {other:.0f} |" in short
    flops = 4 * 512 * 64 * 12  # of forward, for each token; backward has 2.5 times as many
    speeds = [factor * flops / found["attention_512", "ours"][part]["ms"] * 131072 / 1e9 for factor, part in ((1, "forward"), (2.5, "backward"))]
    assert "{:.0f} TFLOP/s forward and {:.0f} backward".format(*speeds) in text


def test_scaling_is_what_was_measured():
    """docs/scaling.md, and results/README.md "scaling_h200", "scaling_h100": each row of the tables, also predicted ones."""
    short, results, shown = text_of("docs/scaling.md"), {}, 0
    for name in ("scaling_h200/scaling.json", "scaling_h200/overlapped.json", "scaling_h100/scaling.json"):
        results[f"results/{name}"] = found = json.loads(text_of(f"results/{name}"))
        place = name.partition("/")[0]
        details = section("results/README.md", place)
        for row in found["rows"]:
            if row["gpus"] == 1:
                continue
            figures = f"| {row['gpus']} | {row['samples_per_second']:,.0f} | {row['tokens_per_second']:,.0f} |"
            figures += f" {row['mfu']:.1%} | {row['efficiency']:.1%} |".replace("%", " %")
            title, batch = scaling.TITLES[row["model"]], "4,096" if row["batch"] == "global" else "512"
            in_short = name == "scaling_h200/scaling.json" or name == "scaling_h200/overlapped.json" and row["gpus"] == 4
            for text, title in ((short, title), (details, title.removeprefix("MosaicBERT-"))):
                rows = [line for line in text.splitlines() if line.startswith(f"| {title} | {batch}") and figures in line]
                assert len(rows) == (text is details or in_short), figures
            shown += in_short
            if place == "scaling_h200":
                assert f"{figures} {row['ms']:,.1f} | {row['without_reduction_ms']:,.1f} |" in details
    assert len(re.findall(r"^\| .* \| [24] \| [\d,]+ \| [\d,]+ \| .* \|$", short, re.MULTILINE)) == shown == 12
    now = results["results/scaling_h200/scaling.json"]
    ddp = {row["model"]: (f"{row['ms']:.1f}", f"{row['ddp_ms']:.1f}") for row in now["rows"] if "ddp_ms" in row}
    sentence = "A step of Base took {} ms with the hooks and {} ms with DDP; a step of Large took {} ms and {} ms."
    assert sentence.format(*ddp["base"], *ddp["large"]) in flat("docs/scaling.md")
    predicted = {(row["model"], row["batch"], row["gpus"]): row for row in now["predicted"]}
    eight = f"Eight GPUs share 4,096 samples at {100 * predicted['base', 'global', 8]['efficiency']:.1f} %"
    assert eight in flat("docs/scaling.md")
    details = text_of("results/README.md")
    lines = re.findall(r"^\| (4,096|512 per GPU) \| (\d+) \| (.*) \|$", details, re.MULTILINE)
    assert len(lines) == 8
    for batch, gpus, cells in lines:
        rows = [predicted[model, "global" if batch == "4,096" else "per_gpu", int(gpus)] for model in ("base", "large")]
        assert cells == " | ".join(f"{row['samples_per_second']:,.0f} | {100 * row['efficiency']:.1f} %" for row in rows)
    for name, count, sentence in (
        ("scaling", 5, "Against the five measured points on two GPUs it is off by {:.1f} to +{:.1f} %."),
        ("overlapped", 10, "Made from the run on two and four GPUs, it was off by {:.1f} to +{:.1f} %"),
    ):
        rows = results[f"results/scaling_h200/{name}.json"]["predicted"]
        off = [100 * (row["ms"] / row["measured_ms"] - 1) for row in rows if row["measured_ms"] and row["gpus"] > 1]
        assert len(off) == count and sentence.format(min(off), max(off)) in flat("results/README.md")
    for (gpu, model, hidden_size, kind), (mfu, source) in estimate.MEASURED_MFU.items():
        if source in results:
            name = "bert" if model == "bert" else {768: "base", 1024: "large"}[hidden_size]
            place = (name, "global", 2)
            rows = [row for row in results[source]["rows"] if (row["model"], row["batch"], row["gpus"]) == place]
            assert [round(row["mfu"], 3) for row in rows] == [mfu]
        elif source.endswith("minutes.jsonl"):
            shares = [record["mfu"] for record in reading.read_log(ROOT / source) if record["event"] == "train"]
            assert round(median(shares), 3) == mfu


def test_fp8_is_what_was_measured():
    """results/README.md "fp8_h200": each step, loss and score; docs/speed.md, docs/training.md and README.md quote them."""
    folder, text = ROOT / "results" / "fp8_h200", section("results/README.md", "fp8_h200/")

    def rows_of(name):
        rows = json.loads((folder / f"{name}.json").read_text())["rows"]
        return {(row["row"], row["entry"]): row for row in rows if "samples_per_second" in row}

    peers = {name: "fast_sums/" + name for name in ("step_fill80", "step_512")} | {"step_large": "fast_sums/step_large_peer"}
    for name in ("step_full", "step_fill80", "step_512", "step_large"):
        file = "step_more" if name in ("step_fill80", "step_512") else name
        ours, fp8 = (rows_of(file)[name, entry] for entry in ("ours", "fp8"))
        peer = rows_of(peers.get(name, file))[name, "varlen_t2"]["samples_per_second"]
        ours_speed, fp8_speed = ours["samples_per_second"], fp8["samples_per_second"]
        cells = f"(fp8_h200/{file}.json) | {ours_speed:,.0f} | {fp8_speed:,.0f} | {fp8_speed / ours_speed:.3f} | "
        cells += f"{ours['peak_gib']:.1f}, {fp8['peak_gib']:.1f} | "
        (row,) = [line for line in text.splitlines() if cells in line]
        assert f"{peer:,.0f}" in row.partition(cells)[2]
        short = f"| {ours_speed:,.0f} | {fp8_speed:,.0f} | {fp8_speed / ours_speed:.2f} | {peer:,.0f} |"
        assert short in text_of("docs/speed.md")
        if name == "step_full":
            assert "1.3 times as fast as in bf16, and 1.4 times" in flat("README.md")
            assert round(fp8_speed / ours_speed, 1) == 1.3 and round(fp8_speed / peer, 1) == 1.4
    old = rows_of("fast_sums/step_full")
    for entry in ("flex_t2", "varlen_t2", "torchao_tensorwise", "torchao_rowwise"):
        speed = f"{old['step_full', entry]['samples_per_second']:,.0f}"
        assert speed in text and (entry == "flex_t2" or speed in text_of("docs/speed.md"))
    parts = {(row["row"], row["entry"]): row for row in json.loads((folder / "writers.json").read_text())["rows"]}
    for row in ("wqkv", "feed_forward"):
        for entry in ("ours", "fp8", "compiled"):
            assert f"{parts[row, entry]['both']['ns_per_token']:.2f}" in text
    losses = {}
    for path in folder.glob("*_1?.jsonl"):
        losses[path.stem] = [record for record in reading.read_log(path) if record["event"] == "eval"][-1]["loss"]
        assert f"[{losses[path.stem]:.4f}](fp8_h200/{path.name})" in text
    means = [sum(losses[f"{kind}_{seed}"] for seed in (17, 18)) / 2 for kind in ("bf16", "fp8")]
    spread = abs(losses["bf16_17"] - losses["bf16_18"])
    assert f"mean is {means[1] - means[0]:.4f} higher; bf16's seeds differ by {spread:.4f}" in " ".join(text.split())
    for file in ("glue_bf16_17", "fast_sums/glue_fp8_17"):
        result = json.loads((folder / f"{file}.json").read_text())
        scores = [result["tasks"][task] for task in ("cola", "sst2", "mrpc", "stsb", "rte")]
        cells = " | ".join(f"{score['score']:.1f} ± {score['score_ci95']:.1f}" for score in scores)
        assert f"({'fp8_h200/' + file}.json) | {cells} | {sum(score['score'] for score in scores) / 5:.1f} |" in text


def test_xl_is_what_was_measured():
    figures = {}
    for name, first, count in (("fp8", 21, 200), ("bf16", 2, 10)):
        log = text_of(f"results/xl_h200/{name}.txt")
        steps = re.findall(r"^step (\d+)/\d+ \| loss \S+ .* \| ([\d,]+) tok/s \| mfu (\S+)% \| mem (\S+) GB", log, re.M)
        assert len(steps) == count
        timed = [step for step in steps if int(step[0]) >= first]
        speed, mfu = median(int(step[1].replace(",", "")) for step in timed), median(float(step[2]) for step in timed)
        figures[name] = speed, f"{speed / (52388 / 416):.0f}", mfu, max(float(step[3]) for step in steps)
    text, training, config = flat("results/README.md"), flat("docs/training.md"), (ROOT / "configs" / "xl.py").read_text()
    speed, samples, mfu, memory = figures["fp8"]
    assert f"{speed:,.0f} tokens/s, {samples} samples of 126 tokens, {mfu:.1f} % of the bf16 peak; at most {memory:.1f} GB" in text
    assert f"{samples} samples/s, {mfu:.0f} % of the bf16 peak, {memory:.0f} GB" in training and f"took {memory:.1f} GB" in config
    assert estimate.MEASURED_MFU["H200", "mosaicbert", 2048, "fp8"][0] == pytest.approx(mfu / 100)
    slower, others, share, most = figures["bf16"]
    assert f"{slower:,.0f} tokens/s, {others} samples/s, {share:.1f} % of the bf16 peak, at {most:.1f} GB" in text
    assert f"FP8 is {speed / slower:.2f} times as fast" in text and f"makes {others} samples/s in {most:.0f} GB" in training
    assert f"{others} samples/s, {share:.0f} % of its bf16 peak; with --fp8 {samples}, {mfu:.0f} %" in config and f"took {most:.1f}." in config


def test_both_paths_end_with_these_losses():
    text = text_of("docs/speed.md")
    for name in ("fast17", "torch17", "fast18"):
        lines = (ROOT / "results" / "fast_path_h100" / f"{name}.jsonl").read_text().splitlines()
        evals = [record for record in map(json.loads, lines) if record["event"] == "eval"]
        assert f"{evals[-1]['loss']:.4f}" in text
