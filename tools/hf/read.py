"""Read BERT or MosaicBERT weights in Hugging Face form: config.json, model.safetensors, and a tokenizer."""

import datetime
import hashlib
import os
import pickle
import re

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import PER_WORD, model_config
from common.files import read_json
from common.options import UserError
from common.vocabulary import load_tokenizer, read_tokenizer
from model import LAYER_NORM_EPS, MAX_POSITIONS, MaskedLM

WORDS, DECODER_BIAS, BERT_BIAS = PER_WORD


def read_hf(path, revision="", tokenizer="", allow_pickle=False):
    """(config, tensors, tokenizer_text) of a directory or weights file, or of a hub id if there is no such path.

    config: what config.json of a checkpoint holds. tensors: {name: fp32 tensor} under this project's names, with the
    pooler and masked-language-model head if there are any. Prints what was dropped or changed.
    Raises: UserError for anything missing, unexpected or unsupported.
    """
    if not os.path.exists(path):
        path = download(path, revision, allow_pickle)
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    weights, tensors, hf = read_weights(path, allow_pickle)
    config_path = os.path.join(directory, "config.json")
    if hf is None:
        hf = read_json(config_path, "expected Hugging Face's files: config.json, model.safetensors, tokenizer.json")
    mosaic = any("attention.self.Wqkv" in name for name in tensors)
    check_config(config_path, hf, mosaic)
    tokenizer_text = find_tokenizer(directory, tokenizer)
    vocab_size = load_tokenizer(tokenizer or directory, tokenizer_text)[0].get_vocab_size()

    rename_head(tensors, weights, mosaic)
    if WORDS not in tensors:
        raise UserError(f"{weights}: has no {WORDS} (expected BERT or MosaicBERT)")
    rows = len(tensors[WORDS])
    if rows < vocab_size:
        raise UserError(f"{weights}: {rows:,} word embeddings, but the tokenizer has {vocab_size:,} entries")
    if rows > vocab_size:
        print(f"{weights}: trimmed {rows:,} word embeddings to the tokenizer's {vocab_size:,} entries")
    if mosaic and hf["attention_probs_dropout_prob"]:  # the published config sets 0.1, which disables its fast kernels
        print(f"{config_path}: attention dropout set to 0, was {hf['attention_probs_dropout_prob']}: MosaicBERT has none")
    config = {
        "model": "mosaicbert" if mosaic else "bert",
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "intermediate_size": hf["intermediate_size"],
        "hidden_dropout": hf["hidden_dropout_prob"],
        "attention_dropout": 0.0 if mosaic else hf["attention_probs_dropout_prob"],
        "vocab_size": vocab_size,
        "tokenizer_sha256": hashlib.sha256(tokenizer_text.encode()).hexdigest(),
    }
    fit_to_model(tensors, config, weights, config_path)
    return config, tensors, tokenizer_text


def download(name, revision, allow_pickle):
    """Download a hub repository; returns the local directory."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name}: no such directory (expected a directory in Hugging Face form, or a hub id)")
    files = ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "tokenizer_config.json"]
    try:
        from huggingface_hub import snapshot_download  # comes with datasets

        files += ["pytorch_model.bin"] if allow_pickle else []
        return snapshot_download(name, revision=revision or None, allow_patterns=files)
    except Exception as error:  # network, authentication, HTTP and library errors have no common base class
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{name}: no such directory, and the download from the hub failed: {reason}") from None


def read_weights(path, allow_pickle):
    """(file, {name: fp32 tensor}, Hugging Face config if the file holds one) of a weights file or its directory."""
    files = [path] if os.path.isfile(path) else [os.path.join(path, f) for f in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if os.path.exists(file)), None)
    if file is None:
        raise UserError(f"{path}: no weights here (expected model.safetensors)")
    hf = None
    if file.endswith(".safetensors"):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error} (is it complete?)") from None
    elif not allow_pickle:
        raise UserError(f"{file}: a pickle, which can run code (--allow_pickle=true reads it, weights only)")
    else:
        tensors, hf = read_pickle(file)
    for prefix in ("module.", "model."):  # from DistributedDataParallel, from Composer
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return file, {our_name(name): tensor.float() for name, tensor in tensors.items()}, hf


def read_pickle(file):
    """(tensors, Hugging Face config or None) of a .bin or a Composer checkpoint, through PyTorch's weights-only loader."""
    # Composer stores timings and the random state, a NumPy array (of NumPy 1 or 2), beside the weights.
    reconstruct = np._core.multiarray._reconstruct
    harmless = [datetime.timedelta, np.ndarray, np.dtype, reconstruct, (reconstruct, "numpy.core.multiarray._reconstruct")]
    harmless += [type(np.dtype(kind)) for kind in ("uint32", "int64", "float64")]
    try:
        with torch.serialization.safe_globals(harmless):
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        found = re.search(r"GLOBAL (\S+)", f"{error}")
        reason = f"it holds {found[1]}" if found else f"not a torch.save file ({type(error).__name__})"
        raise UserError(f"{file}: not weights alone, or damaged: {reason} (no code was run)") from None
    hf = None
    if isinstance(saved, dict) and isinstance(saved.get("state"), dict):
        saved = saved["state"]
        about = saved.get("integrations", {}).get("huggingface", {}).get("model", {})
        hf, saved = about.get("config", {}).get("content"), saved.get("model")
    if not isinstance(saved, dict) or not all(isinstance(value, torch.Tensor) for value in saved.values()):
        raise UserError(f"{file}: no {{name: tensor}} dictionary (expected pytorch_model.bin or a Composer checkpoint)")
    return saved, hf


def our_name(name):
    """This project's name for a tensor: a bare BertModel lacks the `bert.` prefix, old files say gamma and beta."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def check_config(path, hf, mosaic):
    """Raises: UserError naming the field of config.json that this project's models do not support."""
    if hf.get("model_type", "bert") not in ("bert", "mosaic_bert"):
        raise UserError(f"{path}: model_type is {hf['model_type']!r} (only BERT and MosaicBERT are supported)")
    supported = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS, "type_vocab_size": 2}
    if not mosaic:
        supported |= {"max_position_embeddings": MAX_POSITIONS, "position_embedding_type": "absolute"}
    for name, value in supported.items():
        if hf.get(name, value) != value:
            raise UserError(f"{path}: {name} is {hf[name]!r} (only {value!r} is supported)")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in (*sizes, "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if not isinstance(hf.get(name), (int, float)):
            raise UserError(f"{path}: {name} is {hf.get(name)!r} (expected the config of a BERT or MosaicBERT)")


def find_tokenizer(directory, tokenizer):
    """The contents of tokenizer.json: from the option, else from the tokenizer.json or vocab.txt beside the weights."""
    if tokenizer:
        return read_tokenizer(tokenizer)
    path = os.path.join(directory, "tokenizer.json")
    if os.path.exists(path):
        return read_tokenizer(path)
    vocabulary = os.path.join(directory, "vocab.txt")
    if not os.path.exists(vocabulary):
        raise UserError(f"{directory}: no tokenizer here (give --tokenizer; MosaicBERT's is google-bert/bert-base-uncased)")
    about = os.path.join(directory, "tokenizer_config.json")
    lower = read_json(about, "").get("do_lower_case", True) if os.path.exists(about) else True
    return read_tokenizer(vocabulary, cased=not lower)


def rename_head(tensors, weights, mosaic):
    """Rename the masked-language-model head, in place, and drop other heads."""
    decoder = tensors.pop("cls.predictions.decoder.weight", None)
    if decoder is not None and not torch.equal(decoder, tensors.get(WORDS, decoder)):
        raise UserError(f"{weights}: the decoder differs from the word embeddings (only tied weights are supported)")
    biases = [tensors.pop(name) for name in (DECODER_BIAS, BERT_BIAS) if name in tensors]
    if biases:
        if not torch.equal(biases[0], biases[-1]):
            raise UserError(f"{weights}: {BERT_BIAS} and {DECODER_BIAS} differ")
        tensors[DECODER_BIAS if mosaic else BERT_BIAS] = biases[0]
    unused = {"cls.seq_relationship.": "next-sentence head", "classifier.": "classifier", "bert.embeddings.position_ids": ""}
    for prefix, what in unused.items():
        names = [name for name in tensors if name.startswith(prefix)]
        for name in names:
            del tensors[name]
        if names and what:
            print(f"{weights}: dropped its {what}")


def fit_to_model(tensors, config, weights, config_path):
    """Trim or pad the vocabulary, in place, then require exactly the model's names and shapes. Raises: UserError."""
    cfg = model_config(config)
    try:
        cfg.check_model()
        with torch.device("meta"):
            expected = {name: tuple(p.shape) for name, p in MaskedLM(cfg, config["vocab_size"]).named_parameters()}
    except (UserError, TypeError, RuntimeError) as error:
        raise UserError(f"{config_path}: {error}") from None
    for name in set(PER_WORD) & tensors.keys():  # MosaicBERT pads its vocabulary, here with zeros
        tensor, size = tensors[name][: config["vocab_size"]], expected[name][0]
        tensors[name] = torch.cat([tensor, tensor.new_zeros(size - len(tensor), *tensor.shape[1:])])
    C = config["hidden_size"]
    expected |= {"bert.pooler.dense.weight": (C, C), "bert.pooler.dense.bias": (C,)}
    missing = sorted(expected.keys() - tensors.keys())
    for part, what in (("cls.", "masked-language-model head"), ("bert.pooler.", "")):  # may be missing as a whole
        names = [name for name in expected if name.startswith(part)]
        if not set(names) & tensors.keys():
            missing = [name for name in missing if name not in names]
            if what:
                print(f"{weights}: has no {what}")
    unexpected = sorted(tensors.keys() - expected.keys())
    for names, what in ((missing, "missing"), (unexpected, "unexpected")):
        if names:
            raise UserError(f"{weights}: {len(names)} weights {what}: {', '.join(names[:5])}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            shapes = f"{list(tensor.shape)}, but config.json says {list(expected[name])}"
            raise UserError(f"{weights}: {name} has shape {shapes}")
