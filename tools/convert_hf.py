"""Convert models from and to Hugging Face's formats.

    python -m tools.convert_hf --from_hf=google-bert/bert-base-uncased --out=out/bert
    python -m tools.convert_hf --to_hf=out/base --out=exported

--from_hf turns BERT or RoBERTa of any size, MosaicBERT or jina-bert-v2 into a run directory: train.py --init_from,
finetune_glue.py and the tools start from it. --to_hf writes a directory that stock transformers loads (MosaicBERT with
trust_remote_code=True, BERT without), or one for ONNX, llama.cpp or TEI. Every export is compared with this project's
outputs before it appears under its name, by a process that has transformers alone where it can load it; so is every
import, where transformers is installed.

Read next: tools/hf/read.py, tools/hf/write.py, or tools/hf/modeling_mosaic_bert.py, the code that travels with an export
"""

import dataclasses
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors import SafetensorError

import checkpoint
from common.files import read_if_there, write_text
from common.options import UserError, command, load_config
from tools.hf.card import model_card
from tools.hf.hub import check_push, push
from tools.hf.read import find_model, read_hf
from tools.hf.write import check_export, expected_outputs, self_check, write_transformers
from tools.hf.write_gguf import write_gguf
from tools.hf.write_onnx import export_onnx
from tools.hf.write_tei import write_tei

NEEDS = {  # packages, beyond requirements.txt
    "transformers": ("transformers",), "onnx": ("transformers", "onnx", "onnxscript", "onnxruntime"),
    "gguf": ("gguf",), "tei": (),
}  # fmt: skip


FROM_HF, TO_HF = ("revision", "tokenizer", "allow_pickle"), ("format", "task", "glue", "license", "language", "push")


@dataclass
class ConvertConfig:
    # From Hugging Face
    from_hf: str = ""  # directory, weights file or hub id of a BERT, RoBERTa or MosaicBERT; becomes a run directory
    revision: str = ""  # commit, branch or tag of the hub id
    tokenizer: str = ""  # tokenizer.json, BERT vocab.txt or hub id, if there is none beside the weights
    allow_pickle: bool = False  # read .bin and .pt files, weights only: no code in them runs
    # To Hugging Face
    to_hf: str = ""  # run or checkpoint directory, of train.py or finetune_glue.py; becomes a transformers model
    format: Literal["transformers", "onnx", "gguf", "tei"] = "transformers"  # gguf: for llama.cpp; tei: its Jina layout
    task: Literal["", "fill-mask", "feature-extraction"] = ""  # feature-extraction: without the head, for sentence vectors
    glue: str = ""  # glue.json whose scores the model card quotes
    license: str = ""  # of the weights, for the model card, such as apache-2.0; empty: not known
    language: str = ""  # of the texts, for the model card, such as en or en,de; empty: C4's, else not known
    push: str = ""  # owner/name on the hub to upload the export to; a new repository is private
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
    for name in ("tokenizer.json", "config.json"):  # as in any run; prepare_c4.py --tokenizer takes the first
        write_text(os.path.join(cfg.out, name), texts[name])
    again = checkpoint.read_tensors(written, "model.safetensors")
    if not all(torch.equal(tensor, again[name]) for name, tensor in tensors.items()):
        raise UserError(f"{written}: reads back differently (is the disk sound?)")
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{written}: {config['model']}, {count:,} parameters, vocabulary of {config['vocab_size']:,}; read back and equal")


def compare(path, config, tensors, tokenizer_text):
    """Compare tokens, and for a BERT its outputs, with what transformers computes from the same directory."""
    has_head = any(name.startswith("cls.") for name in tensors)
    expected = expected_outputs(config, tensors, tokenizer_text, None, path, encoder_only=not has_head)
    family = "Roberta" if read_if_there(os.path.join(path, "config.json")).get("model_type") == "roberta" else "Bert"
    architecture = family + ("ForMaskedLM" if has_head else "Model") if config["model"] == "bert" else None
    verdict = self_check(path, *expected, architecture, foreign=True)  # None: MosaicBERT's code there is not ours to run
    if "failure" in verdict:
        print(f"{path}: not compared with transformers, which cannot load it: {verdict['failure']}")


def to_hf(cfg):
    """Write an export, and push it if asked; nothing appears at cfg.out unless it passes its check."""
    missing = [package for package in NEEDS[cfg.format] if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--to_hf, format {cfg.format}: needs {', '.join(missing)} (pip install {' '.join(missing)})")
    if os.path.exists(cfg.out) and os.listdir(cfg.out):
        raise UserError(f"{cfg.out}: not empty (choose another --out)")
    if cfg.push:
        check_push(cfg.push)
    model = checkpoint.load(cfg.to_hf)
    labels = tuple(model[0]["task"]["labels"]) if "task" in model[0] else None
    task = task_of(cfg, model[0], labels)
    made = not os.path.isdir(cfg.out)
    try:
        os.makedirs(cfg.out, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cfg.out, prefix="partial_") as partial:
            notes = write_format(partial, cfg, model, labels, task)
            write_text(os.path.join(partial, "README.md"), model_card(cfg, model[0], labels, task, notes))
            for name in sorted(os.listdir(partial), key=lambda name: name == "config.json"):  # last: it makes a model
                os.rename(os.path.join(partial, name), os.path.join(cfg.out, name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{cfg.out}: cannot be written: {error}") from None
    finally:
        if made and os.path.isdir(cfg.out) and not os.listdir(cfg.out):
            os.rmdir(cfg.out)
    print(f"{cfg.out}: {model[0]['model']} for {task}, {sum(t.numel() for t in model[1].values()):,} parameters")
    if cfg.push:
        print(push(cfg.out, cfg.push))


def task_of(cfg, config, labels):
    """What the export is for, as Hugging Face names it. Raises: UserError where the model or the format cannot do it."""
    if cfg.format in ("gguf", "tei") and config["model"] == "bert":
        hint = {"gguf": "llama.cpp has its own converter for BERT", "tei": "for BERT, TEI reads --format=transformers"}
        raise UserError(f"--format={cfg.format}: for MosaicBERT alone ({hint[cfg.format]})")
    encoder = cfg.format in ("gguf", "tei")
    if labels is not None and encoder:
        hint = "export what it was fine-tuned from"
        raise UserError(f"{cfg.to_hf}: a classifier, and format {cfg.format} is for encoders ({hint})")
    able = ("text-classification",) if labels is not None else ("fill-mask", "feature-extraction")[encoder:]
    if cfg.task and cfg.task not in able:
        raise UserError(f"--task={cfg.task}: this model in format {cfg.format} is for {' or '.join(able)}")
    return cfg.task or able[0]


def write_format(path, cfg, model, labels, task):
    """Write and check one format in the directory `path`. Returns {row: value} for the model card."""
    if cfg.format == "gguf":
        return write_gguf(path, *model, name=os.path.basename(os.path.abspath(cfg.out)))
    if cfg.format == "tei":
        return write_tei(path, *model)
    expected = expected_outputs(*model, labels, cfg.to_hf, encoder_only=task == "feature-extraction")
    architecture = write_transformers(path, *model, labels, task)
    verdict = check_export(path, expected, architecture)
    if cfg.format == "onnx":
        return export_onnx(path, expected, architecture)
    return {"checked": f"in {verdict['by']}, largest difference {verdict['difference']:.1e}"}


@command
def main(argv):
    cfg = load_config(ConvertConfig, argv)
    if bool(cfg.from_hf) == bool(cfg.to_hf):
        raise UserError("give either --from_hf or --to_hf")
    direction, foreign = ("--from_hf", TO_HF) if cfg.from_hf else ("--to_hf", FROM_HF)
    for field in dataclasses.fields(cfg):
        if field.name in foreign and getattr(cfg, field.name) != field.default:
            raise UserError(f"--{field.name}: means nothing with {direction}")
    if not cfg.out:
        raise UserError("--out: not given (the directory to write)")
    if cfg.from_hf:
        from_hf(cfg)
    else:
        to_hf(cfg)


if __name__ == "__main__":
    main()
