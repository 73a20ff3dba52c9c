"""Try a checkpoint: fill in [MASK], or turn sentences into vectors.

    python fill_mask.py --checkpoint=out/base --text="Paris is the [MASK] of France."
    python fill_mask.py --checkpoint=out/base --embed=sentences.txt --out=vectors.npy

Read next: README.md, for what else there is
"""

from dataclasses import dataclass

import numpy as np
import torch

from tools import convert_hf
from common.options import UserError, command, load_config
from common.vocabulary import load_tokenizer
from model import MAX_POSITIONS, make_masked_lm

NUM_GUESSES = 5
TOKENS_AT_ONCE = 16384  # of a batch of sentences


@dataclass
class FillMaskConfig:
    checkpoint: str = ""  # run or step_* directory, or a directory or hub id in Hugging Face form
    text: str = ""  # text with one or more [MASK]: prints the best tokens for each, with probabilities
    embed: str = ""  # UTF-8 file, one text a line: writes a vector for each, the mean over its tokens
    out: str = ""  # .npy file for the vectors, (lines, hidden_size) float32
    normalize: bool = False  # scale vectors to length 1


@command
def main(argv):
    cfg = load_config(FillMaskConfig, argv)
    if not cfg.checkpoint:
        raise UserError("--checkpoint: not given (a run directory, such as out/smoke)")
    if bool(cfg.text) == bool(cfg.embed):
        raise UserError("give either --text or --embed")
    if cfg.embed and not cfg.out:
        raise UserError("--out: not given (a .npy file for the vectors)")
    config, tensors, tokenizer_text = convert_hf.read_model(cfg.checkpoint)
    tokenizer, special = load_tokenizer(cfg.checkpoint, tokenizer_text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_masked_lm(config, tensors, cfg.checkpoint, encoder_only=bool(cfg.embed)).to(device)
    if cfg.text:
        fill_mask(model, tokenizer, special, cfg.text, device)
    else:
        vectors = embed(model, tokenizer, special, read_lines(cfg.embed), device, cfg.normalize)
        try:
            with open(cfg.out, "wb") as file:
                np.save(file, vectors)
        except OSError as error:
            raise UserError(f"{cfg.out}: {error.strerror}") from None
        print(f"{cfg.out}: {vectors.shape[0]} vectors of {vectors.shape[1]}")


def token_ids(tokenizer, special, text, limit):
    """[CLS] text [SEP] as a list of ids, cut to `limit` tokens (None: no limit)."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [special["[CLS]"], *ids[: limit and limit - 2], special["[SEP]"]]


def position_limit(model):
    return MAX_POSITIONS if model.cfg.model == "bert" else None


def fill_mask(model, tokenizer, special, text, device):
    """Print the NUM_GUESSES likeliest tokens for each [MASK] of the text, with their probabilities."""
    ids = torch.tensor([token_ids(tokenizer, special, text, position_limit(model))], device=device)
    places = (ids[0] == special["[MASK]"]).nonzero().flatten().tolist()
    if not places:
        raise UserError(f"--text: no [MASK] in {text!r} (write [MASK] where a word is to be guessed)")
    probabilities = model.logits(ids, torch.ones_like(ids))[0].softmax(-1)
    for number, place in enumerate(places, 1):
        print(text if len(places) == 1 else f"{text}  ([MASK] {number} of {len(places)})")
        best = probabilities[place].topk(min(NUM_GUESSES, model.vocab_size))
        for probability, token in zip(best.values.tolist(), best.indices.tolist()):
            print(f"  {probability:6.1%}  {tokenizer.id_to_token(token)}")


@torch.no_grad()
def embed(model, tokenizer, special, texts, device, normalize):
    """(len(texts), hidden_size) float32 array: the mean of each text's last hidden states, [CLS] and [SEP] included."""
    sentences = [token_ids(tokenizer, special, text, position_limit(model)) for text in texts]
    vectors, batch = [], []
    for number, sentence in enumerate(sentences, 1):
        batch.append(sentence)
        if sum(map(len, batch)) < TOKENS_AT_ONCE and number < len(sentences):
            continue
        lengths = torch.tensor([len(ids) for ids in batch], device=device)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        ids = torch.tensor([token for ids in batch for token in ids], device=device)
        hidden = model.bert(ids, cu_seqlens, int(lengths.max()))  # (total_tokens, C)
        sums = [part.sum(0) for part in hidden.split(lengths.tolist())]
        vectors.append(torch.stack(sums) / lengths[:, None])
        batch = []
    vectors = torch.cat(vectors)
    if normalize:
        vectors = torch.nn.functional.normalize(vectors)
    return vectors.float().cpu().numpy()


def read_lines(path):
    """The lines of a text file. Raises: UserError when it is missing, empty or not UTF-8."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (expected a text file)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} (convert the file first)") from None
    if not lines:
        raise UserError(f"{path}: empty (expected one text a line)")
    return lines


if __name__ == "__main__":
    main()
