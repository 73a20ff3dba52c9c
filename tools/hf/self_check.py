"""Load a model as a stranger would, with transformers alone, and compare it with this project's tokens and outputs.

    python -I tools/hf/self_check.py MODEL EXPECTED     (run by tools/hf/write.py)

Writes EXPECTED/verdict.json: versions, the largest absolute difference, the mean cosine of the rows of outputs, and how
many rows have the same top entry.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

BATCH = 8  # texts


def main(path, expected):
    about = json.loads(Path(expected, "about.json").read_text(encoding="utf-8"))
    outputs = np.load(Path(expected, "outputs.npy"), mmap_mode="r")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    by = f"transformers {transformers.__version__}"
    if about["onnx"]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(Path(path, about["onnx"])))
        by = f"onnxruntime {onnxruntime.__version__}, {about['onnx']}"
    elif about["architecture"]:
        kind = about["architecture"].partition("For")[2]
        auto = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
        model = auto.from_pretrained(path, trust_remote_code=about["trust"]).float().eval()
        assert type(model).__name__ == about["architecture"], type(model).__name__
    start, difference, cosines, same = 0, 0.0, 0.0, 0
    for first in range(0, len(about["texts"]), BATCH):
        ids = about["ids"][first : first + BATCH]
        longest = max(map(len, ids))
        texts = about["texts"][first : first + BATCH]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        found = [row[keep].tolist() for row, keep in zip(batch["input_ids"], mask)]
        for text, theirs, ours in zip(texts, found, ids):
            theirs, ours = map(tokenizer.convert_ids_to_tokens, (theirs, ours))
            there, here = [" ".join(map(str, row)) for row in (theirs, ours)]
            assert theirs == ours, f"{text[:60]!r} becomes {there[:200]} in transformers, {here[:200]} here"
        if not about["architecture"]:
            continue
        if about["onnx"]:
            inputs = {name.name: batch[name.name].numpy() for name in session.get_inputs()}
            logits = torch.from_numpy(session.run(None, inputs)[0])
        else:
            with torch.no_grad():
                logits = model(**batch)
                logits = logits.logits if "logits" in logits else logits.last_hidden_state
        logits = logits[mask] if logits.dim() == 3 else logits
        logits = logits[:, : outputs.shape[1]]  # a padded vocabulary has more
        wanted = torch.from_numpy(np.array(outputs[start : start + len(logits)]))
        difference = max(difference, (logits - wanted).abs().max().item())
        cosines += torch.cosine_similarity(logits.double(), wanted.double(), dim=-1).sum().item()
        same += int((logits.argmax(-1) == wanted.argmax(-1)).sum())
        start += len(logits)
    assert not about["architecture"] or start == len(outputs), f"{start} rows, expected {len(outputs)}"
    verdict = {"by": by, "difference": difference, "cosine": cosines / max(1, start), "same": same}
    Path(expected, "verdict.json").write_text(json.dumps(verdict), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
