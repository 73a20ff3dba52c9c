"""The model card of an export: what its checkpoint and its log say."""

import os

import checkpoint
from common.files import read_json
from common.options import UserError
from common.run_directory import read_log


def log_of(directory, step):
    """The (start, train, eval) records in a run's log that belong to its checkpoint of `step`; {} for those it lacks."""
    path, found = os.path.join(directory, "log.jsonl"), {}
    if os.path.exists(path):
        with open(path, "rb") as file:
            contents = file.read()
        if contents and not contents.endswith(b"\n"):
            print(f"{path}: its last line was cut; the model card uses those before")
    for _, record in read_log(directory):
        if record.get("event") == "start":
            resumed_here = f"{record.get('resumed_from')}".endswith(f"step_{step:08d}")
            found |= {} if resumed_here else {"start": record}
        elif record.get("step") == step:
            found[record.get("event")] = record
        elif record.get("step", 0) > step:
            break
    return tuple(found.get(event, {}) for event in ("start", "train", "eval"))


def model_card(cfg, config, labels, task="fill-mask", notes=()):
    """README.md of an export: what the checkpoint and the log say of this step, else "not known".

    cfg: a ConvertConfig. notes: {row: value} that the format adds.
    """
    unknown = "not known"
    path = checkpoint.find(cfg.to_hf)
    file = os.path.join(path, "state.json")
    state = read_json(file, "") if os.path.exists(file) else {}  # a fine-tuned model has none; a converted one, step 0
    step = state.get("step") or None
    start, last, held_out = log_of(os.path.dirname(os.path.abspath(path)), step or 0)
    options = start.get("config", {})
    gpu_hours = state["gpu_seconds"] / 3600 if step and "gpu_seconds" in state else last.get("gpu_hours")
    price = options.get("price_per_gpu_hour")

    def known(value, text="{}", otherwise=unknown):
        return otherwise if value is None else text.format(value)

    scores = unknown
    if cfg.glue:
        results = read_json(cfg.glue, "expected a glue.json of finetune_glue.py")
        try:
            scores = ", ".join(f"{name} {task['score']:.1f}" for name, task in results["tasks"].items())
            scores += f"; mean {results['average']:.1f} (GLUE development sets, recipe {results['recipe']})"
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{cfg.glue}: not a glue.json of finetune_glue.py") from None
    name = os.path.basename(os.path.abspath(cfg.out))
    mosaic = config["model"] == "mosaicbert"
    task = "MaskedLM" if labels is None else "SequenceClassification"
    pipeline = "fill-mask" if labels is None else "text-classification"
    trust = ", trust_remote_code=True" if mosaic else ""
    rows = {
        "architecture": ("MosaicBERT (arXiv 2312.17482)" if mosaic else "BERT")
        + f", {config['num_layers']} layers of {config['hidden_size']}, {config['num_heads']} heads",
        "data": known(options.get("data_dir")),
        "tokens seen": known(step and state.get("tokens"), "{:,}"),
        "steps": known(step, "{:,}") + known(options.get("global_batch_size"), " of {:,} samples", ""),
        "sequence length": known(options.get("seq_length")),
        "held-out loss, 15 % masked": known(held_out.get("loss"), "{:.4f}"),
        "held-out accuracy": known(held_out.get("accuracy"), "{:.1%}"),
        "hardware": known(start.get("device")) + known(start.get("world_size"), ", {} process(es)", ""),
        "GPU-hours": known(gpu_hours, "{:.2f}"),
        "dollars": known(gpu_hours * price if gpu_hours and price else None, "{:.2f}"),
        "GLUE": scores,
        "code": known(start.get("commit")),
        "converted from": known((config.get("converted_from") or {}).get("name")),
        "tokenizer": f"{config['vocab_size']:,} entries, sha256 {config['tokenizer_sha256'] or unknown}",
        "license": cfg.license or unknown,
    }
    if labels:
        rows |= {"labels, in the order of the outputs": ", ".join(labels).replace("|", "\\|")}
    front = ["---", "library_name: transformers", f"pipeline_tag: {pipeline}"]
    front += [f"license: {cfg.license}"] if cfg.license else []
    table = [f"| {what} | {value} |" for what, value in rows.items()]
    example = "Paris is the [MASK] of France." if labels is None else "A text."
    use = [
        "    from transformers import pipeline",
        f'    pipe = pipeline("{pipeline}", "{name}"{trust})',
        f'    pipe("{example}")',
    ]
    if cfg.format == "onnx":
        use = [
            "    import onnxruntime",
            f'    session = onnxruntime.InferenceSession("{name}/model.onnx")',
            '    session.run(["logits"], {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})',
        ]
    about = f"A {task} model for padded batches of any length." if mosaic else f"A {task} model."
    return "\n".join([*front, "---", "", f"# {name}", "", about, "", *use, "", "| | |", "|---|---|", *table, ""])
