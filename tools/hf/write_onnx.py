"""Write ONNX as the directory that Optimum, sentence-transformers' onnx backend and transformers.js open.

    config.json, tokenizer files, onnx/model.onnx (fp32), onnx/model_quantized.onnx (int8 matrices, computed on the fly)
"""

import json
import logging
import os

import torch

from common.files import read_json, write_text
from common.options import UserError
from tools.hf.write import CODE, INT8, NAMES, ONNX, check_export

MAX_BYTES = 2**31  # of one protobuf, weights included


def export_onnx(path, expected, architecture):
    """Turn the transformers directory `path` into ONNX for any batch size and length, and check both models.

    Returns {row: value} for the model card. Raises: UserError.
    """
    import transformers
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if os.path.getsize(os.path.join(path, "model.safetensors")) > 0.95 * MAX_BYTES:
        raise UserError("--format=onnx: the weights exceed the 2 GB of one ONNX file")
    kind = architecture.partition("For")[2]
    auto = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    options = {} if kind else {"add_pooling_layer": False}  # a masked LM has none: it would be random
    model = auto.from_pretrained(path, trust_remote_code=True, **options).eval()
    model.config.return_dict = False
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    names = ["input_ids", "attention_mask", "token_type_ids"]
    examples = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}  # a shared tensor would become one input
    full, int8 = os.path.join(path, ONNX), os.path.join(path, INT8)
    os.makedirs(os.path.dirname(full))
    torch.onnx.export(
        model, kwargs=examples, f=full, input_names=names, output_names=["logits" if kind else "last_hidden_state"],
        dynamic_shapes=dict.fromkeys(names, dimensions), dynamo=True, verbose=False, external_data=False,
    )  # fmt: skip
    logging.disable(logging.WARNING)  # it recommends a preparation that is for convolutions
    # A scale for each column: of a trained BERT the mean cosine is 0.986, with one scale a matrix 0.939.
    quantize_dynamic(full, int8, weight_type=QuantType.QInt8, per_channel=True)
    logging.disable(logging.NOTSET)
    # The graph says all about the model, and readers that know it as a BERT need no code for its configuration.
    about = read_json(os.path.join(path, "config.json"), "just written")
    mosaic, bert = NAMES["mosaicbert"], NAMES["bert"]
    about |= {"model_type": "bert", "architectures": [architecture.replace(mosaic, bert)]}
    about.pop("auto_map", None)
    write_text(os.path.join(path, "config.json"), json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    for name in ("model.safetensors", *CODE):
        if os.path.exists(os.path.join(path, name)):
            os.remove(os.path.join(path, name))
    check_export(path, expected, architecture, ONNX)
    quantized = check_export(path, expected, architecture, INT8)
    sizes = [f"{os.path.getsize(file) / 1e6:.1f} MB" for file in (full, int8)]
    return {"int8": f"{sizes[1]} instead of {sizes[0]}, mean cosine of its outputs {quantized['cosine']:.5f}"}
