"""The labelled data of make smoke: half of the texts have words replaced, and none is in both files."""

import numpy as np

from tests.toy import make_shards
from tools import smoke_task


def texts_of(path):
    return [line.split("\t")[0] for line in path.read_text().splitlines()[1:]]


def test_no_text_is_trained_on_and_scored(tmp_path):
    documents = np.random.default_rng(0).integers(5, 100, (40, smoke_task.WINDOW))
    data = make_shards(tmp_path / "shards", documents, documents)  # held out, they are the same texts
    smoke_task.main([f"--data_dir={data}", f"--out={tmp_path}"])
    train, val = texts_of(tmp_path / "train.tsv"), texts_of(tmp_path / "val.tsv")
    assert len(train) == 40 and 20 <= len(val) < 40 and not set(train) & set(val)
    labels = [line.split("\t")[1] for line in (tmp_path / "train.tsv").read_text().splitlines()[1:]]
    assert labels.count("genuine") == labels.count("replaced") == 20
