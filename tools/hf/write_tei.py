"""Write MosaicBERT's encoder as text-embeddings-inference (TEI) expects jina-bert-v2: the same model under other names."""

import io
import json
import os
from contextlib import redirect_stdout

import numpy as np
from safetensors.torch import load_file, save_file

from common.files import read_json, write_text
from common.options import UserError
from tools.hf.read import read_hf
from tools.hf.write import CODE, MAX_DIFFERENCE, expected_outputs, write_transformers

JINA = "jinaai/jina-bert-implementation"  # by this name TEI chooses its Jina model among those of type "bert"
# TEI fills a table of heads * longest^2 biases when it starts: 0.1 GB in fp16 for 12 heads; 8,192 tokens would be 1.6 GB.
TEI_LONGEST = 2048


def write_tei(path, config, tensors, tokenizer_text):
    """Write TEI's files into the directory `path`, read them back, and compare the encoder's outputs.

    Returns {row: value} for the model card. Raises: UserError.
    """
    expected = expected_outputs(config, tensors, tokenizer_text, None, path, encoder_only=True)
    how = {"max_tokens": None, **config.get("sentence_vectors", {})}
    how["max_tokens"] = min(how["max_tokens"] or TEI_LONGEST, TEI_LONGEST)
    write_transformers(path, {**config, "sentence_vectors": how}, tensors, tokenizer_text, None, "feature-extraction")
    for name in CODE:
        os.remove(os.path.join(path, name))
    about = read_json(os.path.join(path, "config.json"), "just written") | {
        "_name_or_path": JINA, "architectures": ["JinaBertModel"], "model_type": "bert",
        "auto_map": {"AutoConfig": f"{JINA}--configuration_bert.JinaBertConfig"}, "max_position_embeddings": TEI_LONGEST,
        "position_embedding_type": "alibi", "feed_forward_type": "geglu",
    }  # fmt: skip
    write_text(os.path.join(path, "config.json"), json.dumps(about, indent=2) + "\n")
    weights = os.path.join(path, "model.safetensors")
    cut = {}
    for name, tensor in load_file(weights).items():
        name, kind = name.rsplit(".", 1)
        parts = [name.replace("Wqkv", part) for part in ("query", "key", "value")] if name.endswith("Wqkv") else [name]
        cut |= {f"{part}.{kind}": values.clone() for part, values in zip(parts, tensor.chunk(len(parts)))}
    save_file(cut, weights, {"format": "pt"})
    with redirect_stdout(io.StringIO()):  # it reports on a temporary directory
        again = read_hf(path)
    texts, ids, outputs = expected_outputs(*again, None, path, encoder_only=True)
    difference = float(np.abs(outputs - expected[2]).max())
    if (texts, ids) != expected[:2] or not difference <= MAX_DIFFERENCE:
        raise UserError(f"self-check failed: read back, its outputs differ by {difference:.1e} (nothing was written)")
    print(f"read back: {len(texts)} texts have the same tokens; {len(outputs):,} rows, largest difference {difference:.1e}")
    return {"checked": "read back by this project, with equal outputs; not with TEI itself", "longest text": TEI_LONGEST}
