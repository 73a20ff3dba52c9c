"""Hugging Face's weights in: the same hidden states as transformers, and what cannot be read is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from config import UserError
from convert_hf import read_hf
from finetune_glue import load_pretrained, make_classifier
from model import MaskedLM, ModelConfig
from toy import VOCAB_SIZE, make_tokenizer

transformers = pytest.importorskip("transformers")


def save_bert(path, cls):
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    model = cls(config).eval()
    model.save_pretrained(path)
    make_tokenizer(path / "tokenizer.json")
    return model


def hidden_states(pretrained, ids):
    model = make_classifier(pretrained, 2, seed=0).eval()
    cu_seqlens = torch.arange(len(ids) + 1, dtype=torch.int32) * ids.shape[1]
    return model.bert(ids.flatten(), cu_seqlens, ids.shape[1]).view(*ids.shape, -1)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_bert_gives_the_hidden_states_of_transformers(tmp_path, name):
    theirs = save_bert(tmp_path, getattr(transformers, name))
    ids = torch.randint(5, VOCAB_SIZE, (3, 17))
    encoder = theirs if name == "BertModel" else theirs.bert
    with torch.no_grad():
        torch.testing.assert_close(
            hidden_states(load_pretrained(str(tmp_path)), ids), encoder(ids).last_hidden_state, rtol=0, atol=1e-5
        )


def test_pooler_is_kept(tmp_path):
    theirs = save_bert(tmp_path, transformers.BertModel)
    model = make_classifier(load_pretrained(str(tmp_path)), 2, seed=0)
    assert torch.equal(model.bert.pooler.dense.weight, theirs.pooler.dense.weight)


def test_masked_lm_head_is_read(tmp_path):
    theirs = save_bert(tmp_path, transformers.BertForMaskedLM)
    config, tensors, _ = read_hf(str(tmp_path))
    model = MaskedLM(ModelConfig(**{name: config[name] for name in vars(ModelConfig())}), config["vocab_size"]).eval()
    checkpoint.load_weights(model, tensors, "file")
    ids = torch.randint(5, VOCAB_SIZE, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids, torch.ones_like(ids)), theirs(ids).logits, rtol=0, atol=1e-5)


def test_old_names(tmp_path):
    save_bert(tmp_path, transformers.BertModel)
    _, new, _ = read_hf(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model.safetensors")
    _, got, _ = read_hf(str(tmp_path))
    assert got.keys() == new.keys() and all(torch.equal(got[name], new[name]) for name in new)


def test_mosaicbert_layout(tmp_path):
    cfg = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    model = MaskedLM(cfg, VOCAB_SIZE)
    make_tokenizer(tmp_path / "tokenizer.json")
    weights = {name: tensor.clone() for name, tensor in checkpoint.weights_of(model).items()}
    padded = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias"}
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


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (change(hidden_act="relu"), "hidden_act is 'relu'"),
        (change(layer_norm_eps=1e-5), "layer_norm_eps"),
        (change(max_position_embeddings=1024), "max_position_embeddings"),
        (lambda path: (path / "model.safetensors").unlink(), "only safetensors"),
        (lambda path: (path / "tokenizer.json").unlink(), "no such tokenizer"),
        (lambda path: (path / "config.json").write_text("{"), "not JSON"),
        (lambda path: make_tokenizer(path / "tokenizer.json", VOCAB_SIZE + 1), "word embeddings"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\0" * 100), "only safetensors"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, spoil, reason):
    save_bert(tmp_path, transformers.BertModel)
    spoil(tmp_path)
    with pytest.raises(UserError, match=reason):
        read_hf(str(tmp_path))
