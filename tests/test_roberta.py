"""RoBERTa: imported, trained, fine-tuned, asked and exported, with the logits and tokens of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import checkpoint
import data
import finetune_glue
import prepare_c4
import train
from common.encoded import encode
from common.labelled import Examples
from common.options import UserError
from common.vocabulary import ROBERTA_TOKENS, SPECIAL_TOKENS, load_tokenizer, read_tokenizer
from finetune_glue import load_classifier
from model import ModelConfig
from tests.toy import flags
from tools import convert_hf, fill_mask, finetune_own
from tools.hf.read import read_hf

transformers = pytest.importorskip("transformers")

TEXT = ["The cat sat on the mat.", "A dog, a cat and 12 naïve mice: Überraschung!", "the  mat sat\non 中文 the dog's tail"] * 30
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "layer_norm_eps": 1e-5}


def roberta_tokenizer(path, special=("<s>", "<pad>", "</s>", "<unk>", "<mask>"), space=False):
    """RoBERTa's tokenizer.json, trained on TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(space), decoders.ByteLevel()
    special = [AddedToken(token, lstrip=token == "<mask>", normalized=False, special=True) for token in special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    ids = {name: tokenizer.token_to_id(name) for name in ("</s>", "<s>")}
    tokenizer.post_processor = processors.RobertaProcessing(*ids.items(), trim_offsets=True, add_prefix_space=space)
    tokenizer.save(str(path))


def save_roberta(path, cls="RobertaForMaskedLM", **config):
    """A RoBERTa with weights so large, and an eps so far from 1e-12, that a difference shows. Returns transformers' model."""
    torch.manual_seed(0)
    path.mkdir(parents=True)
    roberta_tokenizer(path / "tokenizer.json")
    vocab_size = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    config = {"vocab_size": vocab_size, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, **config}
    model = getattr(transformers, cls)(transformers.RobertaConfig(**SIZE, **config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight * 4 if weight.ndim == 2 else weight + torch.randn_like(weight) * 0.1)
        model.base_model.embeddings.position_embeddings.weight[1] = 100.0  # of <pad>, which has no position here
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """(transformers' model, its directory, the run made from it)"""
    path = tmp_path_factory.mktemp("roberta")
    theirs = save_roberta(path / "hf")
    convert_hf.main([f"--from_hf={path / 'hf'}", f"--out={path / 'run'}"])
    return theirs, path / "hf", path / "run"


def test_logits_are_those_of_transformers(roberta):
    theirs, hf, run = roberta
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(hf), checkpoint.load_model(str(run))
    texts = [(TEXT[0], None), (TEXT[1], TEXT[2]), ("a", "the <mask> cat"), ("dog " * 300, None), ("", "")]
    for pair in texts:
        batch = tokenizer(*pair, return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**batch).logits
        found = ours.logits(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item() / 10))


def test_a_missing_eps_or_offset_would_show(roberta):
    """The tolerance above is far below what an ignored setting changes."""
    theirs, _, run = roberta
    ids = torch.arange(5, 45)[None]
    config, tensors, _ = checkpoint.load(str(run))
    with torch.no_grad():
        expected = theirs(ids).logits
    rows = tensors["bert.embeddings.position_embeddings.weight"]
    for wrong in ({"layer_norm_eps": 1e-12}, rows.roll(1, 0)):
        config_, tensors_ = (config | wrong, tensors) if isinstance(wrong, dict) else (
            config, tensors | {"bert.embeddings.position_embeddings.weight": wrong})
        found = checkpoint.make_masked_lm(config_, tensors_, "run").logits(ids, torch.ones_like(ids))
        print((found - expected).abs().max(), expected.abs().max())
        assert (found - expected).abs().max() > 1e-3
