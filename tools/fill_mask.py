"""Try a checkpoint: fill in [MASK], or turn texts into vectors.

    python -m tools.fill_mask --checkpoint=out/base --text="Paris is the [MASK] of France."
    python -m tools.fill_mask --checkpoint=out/base --embed=sentences.txt --out=vectors.npy

Read next: README.md, for what else a checkpoint is good for
"""

from dataclasses import dataclass

import numpy as np
import torch

import checkpoint
import kernels
from common.batch import Batch, pack
from common.options import UserError, command, load_config
from common.vocabulary import load_tokenizer
from model import MAX_POSITIONS

NUM_GUESSES = 5
BATCH_TOKENS = 16384  # a batch of texts is full once it has this many


@dataclass
class FillMaskConfig:
    checkpoint: str = ""  # run or step_* directory
    text: str = ""  # text with one or more [MASK]: prints the top tokens for each, with probabilities
    embed: str = ""  # UTF-8 file, one text a line: writes a vector for each, the mean over its tokens or as converted
    out: str = ""  # .npy file for the vectors, (lines, hidden_size) float32
    normalize: bool = False  # scale vectors to length 1


def token_ids(model, tokenizer, special, text, longest=None):
    """[CLS] text [SEP] as a list of ids, truncated to `longest` and to BERT's positions; MosaicBERT has no limit."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if model.cfg.model == "bert":
        longest = min(longest or MAX_POSITIONS, MAX_POSITIONS)
    return [special["[CLS]"], *(ids[: longest - 2] if longest else ids), special["[SEP]"]]


def fill_mask(model, tokenizer, special, text, device):
    """Print the NUM_GUESSES most likely tokens for each [MASK] of the text, with their probabilities."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    unknown = [text[slice(*place)] for token, place in zip(encoding.ids, encoding.offsets) if token == special["[UNK]"]]
    if unknown:
        print(f"not in the vocabulary, so the model sees [UNK]: {', '.join(unknown)}")
    ids = torch.tensor([token_ids(model, tokenizer, special, text)], device=device)
    positions = (ids[0] == special["[MASK]"]).nonzero().flatten().tolist()
    if not positions:
        raise UserError(f"--text: no [MASK] in {text!r} (write [MASK] for the word to guess)")
    probabilities = model.logits(ids, torch.ones_like(ids))[0].softmax(-1)
    for number, position in enumerate(positions, 1):
        print(text if len(positions) == 1 else f"{text}  ([MASK] {number} of {len(positions)})")
        best = probabilities[position].topk(min(NUM_GUESSES, model.vocab_size))
        for probability, token in zip(best.values.tolist(), best.indices.tolist()):
            print(f"  {probability:6.1%}  {tokenizer.id_to_token(token)}")


@torch.no_grad()
def embed(model, tokenizer, special, texts, device, normalize, pooling="mean", longest=None):
    """(len(texts), hidden_size) float32 array: the mean of each text's last hidden states, [CLS] and [SEP] included.

    pooling="cls" takes the state of [CLS] instead.
    """
    vectors, batch = [], []
    for number, text in enumerate(texts, 1):
        batch.append(token_ids(model, tokenizer, special, text, longest))
        if sum(map(len, batch)) < BATCH_TOKENS and number < len(texts):
            continue
        lengths = np.array([len(ids) for ids in batch])
        cu_seqlens, _ = pack(lengths, int(lengths.max()))
        ids = torch.tensor([token for ids in batch for token in ids])
        hidden = model.bert(Batch(ids, torch.from_numpy(cu_seqlens), int(lengths.max()), windows=None).to(device))
        vectors += [part[0] if pooling == "cls" else part.mean(0) for part in hidden.split(lengths.tolist())]
        batch = []
    vectors = torch.stack(vectors)
    if normalize:
        vectors = torch.nn.functional.normalize(vectors)
    return vectors.float().cpu().numpy()


def utf8(data, where):
    """Bytes as text. Raises: UserError."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: {error.reason} at byte {error.start + 1} (convert it first)") from None


def read_lines(path):
    """The lines of a text file. Raises: UserError if it is missing, empty or not UTF-8."""
    try:
        with open(path, "rb") as file:
            lines = [utf8(line.rstrip(b"\r\n"), f"{path}:{number}") for number, line in enumerate(file, 1)]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (expected a text file)") from None
    if not lines:
        raise UserError(f"{path}: empty (expected one text a line)")
    return lines


@command
def main(argv):
    cfg = load_config(FillMaskConfig, argv)
    if not cfg.checkpoint:
        raise UserError("--checkpoint: not given (a run directory, such as out/smoke)")
    if bool(cfg.text) == bool(cfg.embed):
        raise UserError("give either --text or --embed")
    if cfg.embed and not cfg.out:
        raise UserError("--out: not given (a .npy file for the vectors)")
    utf8(cfg.text.encode(errors="surrogatepass"), "--text")
    config, tensors, tokenizer_text = checkpoint.load(cfg.checkpoint)
    how = {"pooling": "mean", "normalize": False, "max_tokens": None, **config.get("sentence_vectors", {})}
    if cfg.embed and how["pooling"] not in ("mean", "cls"):
        pooling = f"its vectors need {how['pooling']}, of sentence-transformers"
        raise UserError(f"{cfg.checkpoint}: {pooling} (--embed supports pooling mean and cls)")
    tokenizer, special = load_tokenizer(cfg.checkpoint, tokenizer_text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.set_backend("torch")  # float32 and any head size; speed matters less here
    model = checkpoint.make_masked_lm(config, tensors, cfg.checkpoint, encoder_only=bool(cfg.embed)).to(device)
    if cfg.text:
        return fill_mask(model, tokenizer, special, cfg.text, device)
    normalize, texts = cfg.normalize or how["normalize"], read_lines(cfg.embed)
    vectors = embed(model, tokenizer, special, texts, device, normalize, how["pooling"], how["max_tokens"])
    if unknown := sum(special["[UNK]"] in token_ids(model, tokenizer, special, text, how["max_tokens"]) for text in texts):
        print(f"{unknown:,} of {len(texts):,} texts have words that are not in the vocabulary: the model sees [UNK]")
    try:
        with open(cfg.out, "wb") as file:
            np.save(file, vectors)
    except OSError as error:
        raise UserError(f"{cfg.out}: {error.strerror}") from None
    print(f"{cfg.out}: {vectors.shape[0]} vectors of {vectors.shape[1]}")


if __name__ == "__main__":
    main()
