"""Read Hugging Face's weights: BERT of any size, and MosaicBERT. The one reader of foreign weights.

    from convert_hf import read_hf
    config, tensors, tokenizer_text = read_hf("path/to/bert")

Read next: finetune_glue.py, which starts from what this reads
"""

import hashlib
import os

from safetensors import SafetensorError
from safetensors.torch import load_file

from config import UserError
from data import load_tokenizer, read_json
from model import LAYER_NORM_EPS, MAX_POSITIONS, VOCAB_MULTIPLE

FILES = ["config.json", "model.safetensors", "tokenizer.json"]
HARMLESS = ("cls.seq_relationship.", "bert.embeddings.position_ids")  # next-sentence head, and a buffer of old files


def read_hf(path):
    """(config, tensors, tokenizer_text) of a directory in Hugging Face form, or of a hub id where there is none.

    config: as config.json of a checkpoint of this project. tensors: {name: fp32 tensor} under this project's names,
    with or without a masked-language-model head and a pooler. Raises: UserError.
    """
    if not os.path.isdir(path):
        path = download(path)
    hf = read_json(os.path.join(path, "config.json"), "expected Hugging Face's files: " + ", ".join(FILES))
    weights = os.path.join(path, "model.safetensors")
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: {error} (only safetensors are read, no pickles)") from None
    tensors = {our_name(name): tensor.float() for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(HARMLESS)}

    tokenizer_path = os.path.join(path, "tokenizer.json")
    tokenizer, _ = load_tokenizer(tokenizer_path)
    with open(tokenizer_path, encoding="utf-8") as file:
        tokenizer_text = file.read()
    vocab_size = tokenizer.get_vocab_size()

    mosaic = any("attention.self.Wqkv" in name for name in tensors)
    check_config(path, hf, mosaic)
    word_embeddings = "bert.embeddings.word_embeddings.weight"
    if word_embeddings not in tensors:
        raise UserError(f"{weights}: has no {word_embeddings} (expected BERT or MosaicBERT)")
    rows = len(tensors[word_embeddings])
    if rows < vocab_size or (rows != vocab_size and not mosaic):
        raise UserError(f"{path}: {rows} word embeddings, but its tokenizer has {vocab_size} entries")
    if mosaic:  # padded to a multiple of 8 there, of 64 here
        for name in {word_embeddings, "cls.predictions.decoder.bias"} & tensors.keys():
            padded = tensors[name].new_zeros(-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, *tensors[name].shape[1:])
            padded[:vocab_size] = tensors[name][:vocab_size]
            tensors[name] = padded
    config = {
        "model": "mosaicbert" if mosaic else "bert",
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "intermediate_size": hf["intermediate_size"],
        "hidden_dropout": hf["hidden_dropout_prob"],
        # The published MosaicBERT says 0.1, to switch its kernels off; it was trained without.
        "attention_dropout": 0.0 if mosaic else hf["attention_probs_dropout_prob"],
        "vocab_size": vocab_size,
        "tokenizer_sha256": hashlib.sha256(tokenizer_text.encode()).hexdigest(),
    }
    return config, tensors, tokenizer_text


def download(name):
    """The local copy of a hub repository's files."""
    try:
        from huggingface_hub import snapshot_download  # comes with datasets

        return snapshot_download(name, allow_patterns=FILES)
    except Exception as error:  # whatever the network and the libraries between raise
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{name}: no such directory, and cannot be had from the hub: {reason}") from None


def our_name(name):
    """This project's name of a tensor: a bare BertModel's lack `bert.`, old files say gamma and beta."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def check_config(path, hf, mosaic):
    """Raises: UserError naming the field of config.json that this project's models cannot follow."""
    wanted = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS, "type_vocab_size": 2}
    if not mosaic:
        wanted |= {"model_type": "bert", "max_position_embeddings": MAX_POSITIONS, "position_embedding_type": "absolute"}
    for name, value in wanted.items():
        if hf.get(name, value) != value:
            raise UserError(f"{path}/config.json: {name} is {hf[name]!r} (only {value!r} can be read)")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in (*sizes, "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if name not in hf:
            raise UserError(f"{path}/config.json: has no {name} (expected BERT or MosaicBERT)")
