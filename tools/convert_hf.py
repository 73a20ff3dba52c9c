"""Convert models from and to Hugging Face's formats.

    python -m tools.convert_hf --from_hf=google-bert/bert-base-uncased --out=out/bert
    python -m tools.convert_hf --to_hf=out/base --out=exported

--from_hf turns BERT of any size, or MosaicBERT, into a run directory: train.py --init_from, finetune_glue.py and the
tools start from it. --to_hf writes a directory that stock transformers loads: MosaicBERT with trust_remote_code=True, BERT
without. Every export is checked by a process that has transformers alone, before it appears under its name; so is every
import, where transformers is installed.

Read next: tools/hf/read.py, tools/hf/write.py, or tools/hf/modeling_mosaic_bert.py, the code that travels with an export
"""

import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors import SafetensorError

import checkpoint
from common.files import write_text
from common.options import UserError, command, load_config
from tools.hf.read import find_model, read_hf
from tools.hf.write import expected_outputs, export_onnx, model_card, self_check, write_transformers


@dataclass
class ConvertConfig:
    # From Hugging Face
    from_hf: str = ""  # directory, weights file or hub id of a BERT or MosaicBERT; becomes a run directory
    revision: str = ""  # commit, branch or tag of the hub id
    tokenizer: str = ""  # tokenizer.json, BERT vocab.txt or hub id, if there is none beside the weights
    allow_pickle: bool = False  # read .bin and .pt files, weights only: no code in them runs
    # To Hugging Face
    to_hf: str = ""  # run or checkpoint directory, of train.py or finetune_glue.py; becomes a transformers model
    format: Literal["transformers", "onnx"] = "transformers"  # onnx: model.onnx and its tokenizer
    glue: str = ""  # glue.json whose scores the model card quotes
    license: str = ""  # of the weights, for the model card; empty: not known
    # Both
    out: str = ""  # directory to write


def from_hf(cfg):
    """Write a run directory with one checkpoint, of step 0, and read it back."""
    if any(checkpoint.steps(cfg.out)) or os.path.exists(os.path.join(cfg.out, "config.json")):
        raise UserError(f"{cfg.out}: already holds a run (choose another --out)")
    path = find_model(cfg.from_hf, cfg.revision, cfg.allow_pickle)
    config, tensors, tokenizer_text = read_hf(path, tokenizer=cfg.tokenizer, allow_pickle=cfg.allow_pickle)
    if os.path.isdir(path) and not cfg.tokenizer and importlib.util.find_spec("transformers"):
        compare(path, config, tensors, tokenizer_text)
    config["format"] = checkpoint.FORMAT
    config["converted_from"] = {"name": cfg.from_hf, "revision": cfg.revision or None}
    texts = {
        "config.json": json.dumps(config, indent=1),
        "tokenizer.json": tokenizer_text,
        "state.json": json.dumps({"step": 0, "tokens": 0, "samples": 0, "seconds": 0.0}, indent=1),
    }
    os.makedirs(cfg.out, exist_ok=True)
    written = checkpoint.save(cfg.out, 0, {"model.safetensors": dict(sorted(tensors.items()))}, texts)
    write_text(os.path.join(cfg.out, "config.json"), texts["config.json"])
    _, again, _ = checkpoint.load(cfg.out)
    if not all(torch.equal(tensor, again[name]) for name, tensor in tensors.items()):
        raise UserError(f"{written}: reads back differently (is the disk sound?)")
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{written}: {config['model']}, {count:,} parameters, vocabulary of {config['vocab_size']:,}; read back and equal")


def compare(path, config, tensors, tokenizer_text):
    """Compare tokens, and for a BERT its outputs, with what transformers computes from the same directory."""
    has_head = any(name.startswith("cls.") for name in tensors)
    expected = expected_outputs(config, tensors, tokenizer_text, None, path, encoder_only=not has_head)
    architecture = ("BertForMaskedLM" if has_head else "BertModel") if config["model"] == "bert" else None
    failure = self_check(path, *expected, architecture, foreign=True)  # None: MosaicBERT's code there is not ours to run
    if failure:
        print(f"{path}: not compared with transformers, which cannot load it: {failure}")


def to_hf(cfg):
    """Write a transformers directory or an ONNX model; nothing appears at cfg.out unless the self-check passes."""
    needed = ("transformers", *(("onnx", "onnxscript", "onnxruntime") if cfg.format == "onnx" else ()))
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--to_hf, format {cfg.format}: needs {', '.join(missing)} (pip install {' '.join(missing)})")
    if os.path.exists(cfg.out) and os.listdir(cfg.out):
        raise UserError(f"{cfg.out}: not empty (choose another --out)")
    config, tensors, tokenizer_text = checkpoint.load(cfg.to_hf)
    labels = tuple(config["task"]["labels"]) if "task" in config else None
    expected = expected_outputs(config, tensors, tokenizer_text, labels, cfg.to_hf)
    card = model_card(cfg, config, labels)
    made = not os.path.isdir(cfg.out)
    try:
        os.makedirs(cfg.out, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cfg.out, prefix="partial_") as partial:
            architecture = write_transformers(partial, config, tensors, tokenizer_text, labels, card)
            check_export(partial, expected, architecture)
            if cfg.format == "onnx":
                export_onnx(partial, architecture)
                check_export(partial, expected, architecture, onnx=True)
            for name in sorted(os.listdir(partial), key=lambda name: name == "config.json"):  # last: it makes a model
                os.rename(os.path.join(partial, name), os.path.join(cfg.out, name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{cfg.out}: cannot be written: {error}") from None
    finally:
        if made and os.path.isdir(cfg.out) and not os.listdir(cfg.out):
            os.rmdir(cfg.out)
    print(f"{cfg.out}: {architecture}, {sum(t.numel() for t in tensors.values()):,} parameters")


def check_export(path, expected, architecture, onnx=False):
    failure = self_check(path, *expected, architecture, onnx)
    if failure:
        raise UserError(f"self-check: {failure} (nothing was written)")


@command
def main(argv):
    cfg = load_config(ConvertConfig, argv)
    if bool(cfg.from_hf) == bool(cfg.to_hf):
        raise UserError("give either --from_hf or --to_hf")
    if not cfg.out:
        raise UserError("--out: not given (the directory to write)")
    if cfg.from_hf:
        from_hf(cfg)
    else:
        to_hf(cfg)


if __name__ == "__main__":
    main()
