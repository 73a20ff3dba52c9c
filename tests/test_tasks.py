"""docs/tasks.md: each script of the page runs as it stands there, on an export of a toy model, and learns a toy task."""

import json
import re

import numpy as np
import pytest
import torch

from common.vocabulary import finish, wordpiece
from studies import finetuning_speed
from tests.toy import ROOT, SPECIAL, VOCAB_SIZE, make_run
from tools import convert_hf, fill_mask

PAGE = ROOT / "docs/tasks.md"
ROWS = {"train": 2000, "test": 64}


def scripts():
    """{heading: the script under it, on the lines where the page has it}"""
    text, found = PAGE.read_text(), {}
    for part in re.finditer(r"^## (.*)\n(?:(?!^## |^```).*\n)*```python\n((?:(?!```).*\n)*)", text, re.MULTILINE):
        found[part[1]] = "\n" * text[: part.start(2)].count("\n") + part[2]
    return found


def words(rng, low, high, least=3, most=12):
    return [f"w{i}" for i in rng.integers(low, high, rng.integers(least, most))]


def named(rng):
    """w80 to w84 begin a name, w85 to w89 may follow. Some words are two tokens."""
    people = [[f"w{rng.integers(80, 85)}", *(f"w{i}" for i in rng.integers(85, 90, rng.integers(3)))] for _ in range(2)]
    parts = [words(rng, 0, 80), people[0], words(rng, 0, 80), people[1]]
    tags = [["O"] * len(part) if i % 2 == 0 else ["B-PER"] + ["I-PER"] * (len(part) - 1) for i, part in enumerate(parts)]
    return {"words": [word + "x" * (rng.random() < 0.3) for word in sum(parts, [])], "tags": sum(tags, [])}


def asked(rng):
    """The only word from w80 on is the answer."""
    before, (answer,), after = words(rng, 0, 80), words(rng, 80, 94, 1, 2), words(rng, 0, 80)
    context = " ".join([*before, answer, *after])
    return {"question": "w1 w2", "context": context, "answer": answer, "start": context.index(answer)}


def labelled(rng):
    """w80, w81 and w82 each give a label."""
    given = [word for word in ("w80", "w81", "w82") if rng.random() < 0.5]
    return {"text": " ".join(rng.permutation([*words(rng, 0, 80), *given])), "labels": [f"has {word}" for word in given]}


def chosen(rng):
    """The choice with w90."""
    right = int(rng.integers(3))
    choices = [" ".join(words(rng, 0, 80) + ["w90"] * (i == right) + words(rng, 0, 80)) for i in range(3)]
    return {"question": "w1 w2", "choices": choices, "answer": right}


def paired(rng):
    """The same words of another language: w47 for w7."""
    query = rng.integers(0, 40, 4)
    return {"query": " ".join(f"w{i}" for i in query), "text": " ".join(f"w{i + 40}" for i in query)}


def ranked(rng):
    """Texts with w90 belong to the query."""
    label = int(rng.integers(2))
    return {"query": "w1 w2", "text": " ".join(words(rng, 0, 80) + ["w90"] * label + words(rng, 0, 80)), "label": label}


def classed(rng):
    return {name: value for name, value in ranked(rng).items() if name != "query"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("tasks")
    convert_hf.main([f"--to_hf={make_run(path / 'run', scale=8.0)}", f"--out={path / 'exported'}"])
    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(VOCAB_SIZE - 6)), "##x"]
    tokenizer = wordpiece(True, {word: i for i, word in enumerate(vocabulary)})
    finish(tokenizer)
    tokenizer.save(str(path / "exported/tokenizer.json"))
    return path / "exported"


@pytest.fixture
def run(exported, tmp_path, monkeypatch):
    """run(heading, row) executes the page's script where exported/ and rows of data lie; returns its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "exported").symlink_to(exported)

    def execute(heading, row):
        for seed, (split, count) in enumerate(ROWS.items()):
            rng = np.random.default_rng(seed)
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row(rng)) + "\n" for _ in range(count)))
        script = scripts()[heading]
        faster = re.sub(r"learning_rate=5e-\d", "learning_rate=3e-3", script)  # toy weights are small
        assert faster != script
        torch.manual_seed(0)
        names = {"__name__": "__main__"}
        exec(compile(faster, PAGE, "exec"), names)
        return names

    return execute


def test_every_script_of_the_page_is_run():
    source = (ROOT / "tests/test_tasks.py").read_text()
    tested = re.findall(r'= run\("(.*?)", ', source)
    assert sorted(tested) == sorted(scripts()) and PAGE.read_text().count("```python") == len(tested) == 7
    linked = re.findall(r"^\| \[(.*?)\]\(#", PAGE.read_text(), re.MULTILINE)
    assert [title.lower() for title in scripts()] == [title.lower() for title in linked]


def evaluated(names, metric="accuracy"):
    return names["trainer"].evaluate()[f"eval_{metric}"]


@pytest.mark.slow
def test_named_entities(run, capsys):
    pytest.importorskip("accelerate")
    names = run("Named entities", named)
    assert evaluated(names) > 0.95
    rows = names["data"]["test"].select(range(20))
    for row in rows:  # the reloaded model, through its pipeline
        found = names["find"](" ".join(row["words"]))
        right = [word for word, tag in zip(row["words"], row["tags"]) if tag != "O"]
        assert " ".join(entity["word"] for entity in found).split() == right
        assert len(found) == row["tags"].count("B-PER")


@pytest.mark.slow
def test_question_answering(run):
    pytest.importorskip("accelerate")
    names = run("Question answering", asked)
    assert names["trainer"].evaluate()["eval_loss"] < 0.2  # ln(20) at the start
    rows = names["data"]["test"]
    answers = [names["answer"](row["question"], row["context"]) for row in rows]
    assert np.mean([answer == row["answer"] for answer, row in zip(answers, rows)]) > 0.95
    cut = {"question": "w1", "context": "w5 " * 600 + "w85", "answer": "w85", "start": 1800}
    assert names["encode"](cut)["start_positions"] == 0 and len(names["encode"](cut)["input_ids"]) == 512


@pytest.mark.slow
def test_several_labels_per_text(run):
    pytest.importorskip("accelerate")
    names = run("Several labels per text", labelled)
    assert evaluated(names) > 0.95
    scores = {found["label"]: found["score"] for found in names["label"]("w3 w81 w5 w82")[0]}
    assert scores["has w80"] < 0.5 < min(scores["has w81"], scores["has w82"])


@pytest.mark.slow
def test_multiple_choice(run, capsys):
    pytest.importorskip("accelerate")
    names = run("Multiple choice", chosen)
    assert evaluated(names) > 0.95
    assert "w90" in capsys.readouterr().out.splitlines()[-1].split()  # the last line: what the reloaded model chose


@pytest.mark.slow
def test_sentence_embeddings(run, capsys):
    pytest.importorskip("sentence_transformers")
    names = run("Sentence embeddings", paired)
    found = int(re.findall(r"(\d+) of 64 queries find their text first", capsys.readouterr().out)[-1])
    assert found > 50
    convert_hf.main(["--from_hf=out/vectors", "--out=out/vectors_run"])
    with open("sentences.txt", "w") as file:
        file.write("".join(f"{text}\n" for text in names["data"]["test"]["query"]))
    fill_mask.main(["--checkpoint=out/vectors_run", "--embed=sentences.txt", "--out=vectors.npy"])
    theirs = names["model"].encode(names["data"]["test"]["query"])
    np.testing.assert_allclose(np.load("vectors.npy"), theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_reranking(run):
    pytest.importorskip("sentence_transformers")
    names = run("Reranking", ranked)
    rows = names["data"]["test"]
    order = names["model"].rank("w1 w2", rows["text"])
    relevant = [rows[found["corpus_id"]]["label"] for found in order]
    assert sum(relevant[: sum(relevant)]) >= 0.95 * sum(relevant)


@pytest.mark.slow
def test_lora(run):
    pytest.importorskip("peft")
    names = run("LoRA", classed)
    assert evaluated(names) > 0.95
    before = dict(names["pretrained"]().named_parameters())
    after = dict(names["model"].named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.rpartition(".")[0].rpartition("layer.0.")[2] for name in changed if "layer.0" in name} == {
        "attention.self.Wqkv", "attention.output.dense", "mlp.gated_layers", "mlp.wo",
    }  # fmt: skip
    ids = torch.randint(5, VOCAB_SIZE, (4, 9))
    merged = names["AutoModelForSequenceClassification"].from_pretrained("out/merged", trust_remote_code=True)
    trained = names["trainer"].model.eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained(ids).logits, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def test_the_speed_is_that_of_the_log():
    found = json.loads((ROOT / "results/finetuning_speed.json").read_text())
    times = {name: np.median(seconds) for name, seconds in found["seconds"].items()}
    text = " ".join(PAGE.read_text().partition("\n## Speed\n")[2].split())
    cells = [f"{times[name]:.1f} s | {times[name] / times['ours']:.1f} |" for name in times]
    assert len(cells) == 3 and not [cell for cell in cells if cell not in text]
    sizes = found["config"]
    about = f"{sizes['num_layers']} layers of {sizes['hidden_size']}, {sizes['texts']:,} texts"
    assert f"{about} of {found['mean_length']:.0f} tokens on average and at most {found['longest']}, batches of {sizes['batch_size']}" in text
    assert f"transformers {found['versions']['transformers']}" in text and len(found["seconds"]["ours"]) == sizes["turns"]


@pytest.mark.slow
def test_the_study_of_speed(tmp_path):
    pytest.importorskip("accelerate")
    small = ["--texts=64", "--hidden_size=32", "--num_layers=1", "--num_heads=2", "--turns=1"]
    finetuning_speed.main([f"--out={tmp_path / 'out'}", *small])
    seconds = json.loads((tmp_path / "out/speed.json").read_text())["seconds"]
    assert {name: len(took) for name, took in seconds.items()} == {"ours": 1, "trainer": 1, "trainer, by length": 1}
