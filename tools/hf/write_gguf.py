"""Write GGUF for llama.cpp, whose jina-bert-v2 is MosaicBERT's encoder: ALiBi, gated GELU, LayerNorm after the residual.

It computes GELU by its tanh approximation, so its vectors differ from this project's in the fourth digit.
"""

import json
import os

import numpy as np
import torch

from common.options import UserError
from common.vocabulary import load_tokenizer
from model import LAYER_NORM_EPS
from tools.hf.write import LONGEST, expected_outputs, vocabulary

PRECISIONS = {"F16": 0.9999, "Q8_0": 0.99}  # of the matrices: the least mean cosine of the hidden states
LAYER = {  # of encoder.layer.N, without the parts that are cut: (this project's name, llama.cpp's)
    "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
    "mlp.wo": "ffn_down", "mlp.layernorm": "layer_output_norm",
}  # fmt: skip
EMBEDDINGS = {"word_embeddings": "token_embd", "token_type_embeddings": "token_types", "LayerNorm": "token_embd_norm"}


def gguf_names(num_layers):
    """{name of a tensor here: names of its parts in the file, one below the other}."""
    names = {f"bert.embeddings.{ours}": [theirs] for ours, theirs in EMBEDDINGS.items()}
    for i in range(num_layers):
        ours, theirs = f"bert.encoder.layer.{i}.", f"blk.{i}."
        names |= {ours + name: [theirs + other] for name, other in LAYER.items()}
        names[f"{ours}attention.self.Wqkv"] = [f"{theirs}attn_{part}" for part in "qkv"]
        names[f"{ours}mlp.gated_layers"] = [f"{theirs}ffn_gate", f"{theirs}ffn_up"]
    return names


def write_gguf(path, config, tensors, tokenizer_text, name):
    """Write model-F16.gguf and model-Q8_0.gguf, read both back, and compare the encoder's outputs.

    Returns {row: value} for the model card. Raises: UserError.
    """
    words, normalizer = check_tokenizer(tokenizer_text)
    expected = expected_outputs(config, tensors, tokenizer_text, None, path, encoder_only=True)[2]
    notes = {}
    for precision, least in PRECISIONS.items():
        file = os.path.join(path, f"model-{precision}.gguf")
        write_file(file, config, tensors, (words, normalizer, tokenizer_text), name, precision)
        again = {**tensors, **read_back(file, config, tensors)}
        outputs = expected_outputs(config, again, tokenizer_text, None, path, encoder_only=True)[2]
        cosine = torch.cosine_similarity(torch.from_numpy(outputs), torch.from_numpy(expected)).mean().item()
        found = f"{os.path.getsize(file) / 1e6:.1f} MB, mean cosine of its hidden states {cosine:.6f}"
        print(f"{os.path.basename(file)}: read back: {found}")
        if not cosine >= least:
            raise UserError(f"self-check failed: the cosine of {precision} must be {least} (nothing was written)")
        notes[os.path.basename(file)] = found
    return notes


def check_tokenizer(text):
    """(the vocabulary's words, BertNormalizer's settings). Raises: UserError where llama.cpp has no such tokenizer."""
    contents, words = json.loads(text), vocabulary(text)
    normalizer, split = contents.get("normalizer") or {}, contents.get("pre_tokenizer") or {}
    # A vocabulary trained here also cuts words above 100 characters, and composes letters.
    split, (*first, normalizer) = (split.get("pretokenizers") or [split])[0], normalizer.get("normalizers") or [normalizer]
    is_bert = normalizer.get("type") == "BertNormalizer" and first in ([], [{"type": "NFC"}])
    if not words or not is_bert or split.get("type") != "BertPreTokenizer":
        raise UserError("--format=gguf: the tokenizer is not BERT's WordPiece (llama.cpp has no other for this architecture)")
    return words, normalizer


def write_file(file, config, tensors, tokenizer, name, precision):
    import gguf

    (words, normalizer, text), how = tokenizer, config.get("sentence_vectors", {})
    writer = gguf.GGUFWriter(file, "jina-bert-v2")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{precision}"])
    writer.add_context_length(LONGEST["mosaicbert"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_layers"])
    writer.add_head_count(config["num_heads"])
    writer.add_layer_norm_eps(LAYER_NORM_EPS)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType[how.get("pooling", "mean").upper()])
    writer.add_token_type_count(2)
    # llama.cpp marks what begins a word where WordPiece marks what continues it.
    _, special = load_tokenizer("tokenizer.json", text)
    marked = [word if word in special else word[2:] if word.startswith("##") else "\u2581" + word for word in words]
    kinds = [gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in words]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(marked)
    writer.add_token_types(kinds)
    for token, add in (("PAD", "pad"), ("UNK", "unk"), ("CLS", "bos"), ("SEP", "eos"), ("SEP", "sep"), ("MASK", "mask")):
        getattr(writer, f"add_{add}_token_id")(special[f"[{token}]"])
    lower, strip = normalizer["lowercase"], normalizer["strip_accents"]
    # Versions of llama.cpp that do not know these keys lowercase all texts and drop all accents.
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", lower)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", lower if strip is None else strip)
    for ours, theirs in gguf_names(config["num_layers"]).items():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" not in tensors:
                continue
            tensor = tensors[f"{ours}.{kind}"]
            tensor = tensor[: len(words)] if theirs == ["token_embd"] else tensor  # without the padded vocabulary
            for part, values in zip(theirs, tensor.chunk(len(theirs))):
                write_tensor(writer, f"{part}.{kind}", values.numpy(), precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tensor(writer, name, values, precision):
    """Add a tensor: a matrix in the given precision, anything else in fp32. Q8_0 has blocks of 32, else F16 stands in."""
    import gguf

    kind = gguf.GGMLQuantizationType.F32
    if values.ndim == 2 and name != "token_types.weight":
        kind = gguf.GGMLQuantizationType[precision if values.shape[1] % 32 == 0 else "F16"]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def read_back(file, config, tensors):
    """{name: tensor} of the encoder's weights in a file."""
    import gguf

    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    found = {}
    for ours, theirs in gguf_names(config["num_layers"]).items():
        for kind in ("weight", "bias"):
            if f"{theirs[0]}.{kind}" in stored:
                found[f"{ours}.{kind}"] = torch.cat([torch.tensor(stored.pop(f"{part}.{kind}")) for part in theirs])
    words, rows = "bert.embeddings.word_embeddings.weight", config["vocab_size"]
    found[words] = torch.cat([found[words], tensors[words][rows:]])
    assert not stored, f"{file}: unexpected {sorted(stored)[:3]}"
    return found
