"""Try a checkpoint: fill in [MASK], or turn texts into vectors.

    python -m tools.fill_mask --checkpoint=out/base --text="Paris is the [MASK] of France."
    python -m tools.fill_mask --checkpoint=out/base --embed=sentences.txt --out=vectors.npy

Read next: README.md, for what else a checkpoint is good for
"""

import io
import os
from dataclasses import dataclass

import numpy as np
import torch

import checkpoint
import kernels
from common.batch import Batch, pack
from common.files import whole_file
from common.labelled import Row, warn_of_lost_texts
from common.lines import COMPRESSIONS, decompress, not_text, not_utf8, read_error, read_errors, split_suffixes
from common.options import UserError, command, load_config
from common.vocabulary import load_tokenizer, plain_blanks
from model import MAX_POSITIONS

NUM_GUESSES = 5
BATCH_TOKENS = 16384  # a batch of texts is full once it has this many
LONGEST = 8192  # tokens of a text; plain attention takes 3 * 12 heads * 8192^2 * 4 bytes = 10 GB for so many in a base model


@dataclass
class FillMaskConfig:
    checkpoint: str = ""  # run or step_* directory
    text: str = ""  # text with one or more [MASK] (RoBERTa: <mask>): prints the top tokens for each, with probabilities
    embed: str = ""  # UTF-8 file, also .gz, one text a line: writes a vector for each, the mean over its tokens or as converted
    out: str = ""  # .npy file for the vectors, (lines, hidden_size) float32
    normalize: bool = False  # scale vectors to length 1, as those of some converted models always are


def token_ids(model, tokenizer, special, texts, config, longest=None):
    """[CLS] text [SEP] of each text as an int64 array of ids, truncated to `longest`, BERT's positions, or LONGEST.

    Prints how many were, or are longer than those that the model was trained on. config: the checkpoint's.
    """
    longest = min(longest or LONGEST, MAX_POSITIONS if model.cfg.model == "bert" else LONGEST)
    sequences, lengths = [], []
    for text in texts:
        ids = tokenizer.encode(plain_blanks(text), add_special_tokens=False).ids
        sequences.append(np.array([special["[CLS]"], *ids[: longest - 2], special["[SEP]"]]))
        lengths.append(len(ids) + 2)
    trained = config["task"]["max_length"] if "task" in config else config.get("seq_length", np.inf)
    for limit, what in ((longest, "{} tokens, and truncated"), (trained, "the {} tokens that the model was trained on")):
        if count := sum(length > limit for length in lengths):
            are = "is" if count == 1 else "are"
            print(f"{count:,} of {len(lengths):,} texts {are} longer than {what.format(f'{limit:,}')}")
    return sequences


def fill_mask(model, tokenizer, special, text, device, config):
    """Print the NUM_GUESSES most likely tokens for each [MASK] of the text, with their probabilities."""
    encoding = tokenizer.encode(plain_blanks(text), add_special_tokens=False)
    unknown = [text[slice(*place)] for token, place in zip(encoding.ids, encoding.offsets) if token == special["[UNK]"]]
    if unknown:
        print(f"not in the vocabulary, so the model sees [UNK]: {', '.join(unknown)}")
    ids = torch.from_numpy(token_ids(model, tokenizer, special, [text], config)[0])[None].to(device)
    positions = (ids[0] == special["[MASK]"]).nonzero().flatten().tolist()
    mask = tokenizer.id_to_token(special["[MASK]"])
    if not positions:
        text = text if len(text) < 200 else f"{text[:200]}..."
        raise UserError(f"--text: no {mask} in the {ids.shape[1]:,} tokens of {text!r} (write {mask} for the word to guess)")
    probabilities = model.logits(ids, torch.ones_like(ids))[0].softmax(-1)
    for number, position in enumerate(positions, 1):
        print(text if len(positions) == 1 else f"{text}  ({mask} {number} of {len(positions)})")
        best = probabilities[position].topk(min(NUM_GUESSES, model.vocab_size))
        for probability, token in zip(best.values.tolist(), best.indices.tolist()):
            print(f"  {probability:6.1%}  {tokenizer.id_to_token(token)}")


@torch.no_grad()
def embed(model, sequences, device, normalize, pooling="mean"):
    """(len(sequences), hidden_size) float32 array: the mean of each one's last hidden states, [CLS] and [SEP] included.

    sequences: as token_ids returns them. pooling="cls" takes the state of [CLS] instead.
    """
    vectors, batch = [], []
    for number, ids in enumerate(sequences, 1):
        batch.append(ids)
        lengths = np.array([len(ids) for ids in batch])
        # Texts of the same length share attention's memory, the squares of their lengths.
        if lengths.sum() < BATCH_TOKENS and (lengths**2).sum() < LONGEST**2 and number < len(sequences):
            continue
        cu_seqlens, _ = pack(lengths, int(lengths.max()))
        ids = torch.from_numpy(np.concatenate(batch))
        hidden = model.bert(Batch(ids, torch.from_numpy(cu_seqlens), int(lengths.max()), windows=None).to(device))
        vectors += [part[0] if pooling == "cls" else part.mean(0) for part in hidden.split(lengths.tolist())]
        batch = []
    vectors = torch.stack(vectors)
    if normalize:
        vectors = torch.nn.functional.normalize(vectors)
    return vectors.float().cpu().numpy()


def read_lines(path):
    """The lines of a text file, also compressed. Raises: UserError if it is missing, no UTF-8 text, or has none."""
    kind, compression = split_suffixes(path)
    if kind in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        raise UserError(f"{path}: a {kind} file (expected plain text, one text a line: write its column of texts into one)")
    try:
        with open(path, "rb") as raw, decompress(raw, compression) as file:
            lines = [line.rstrip(b"\r\n") for line in file]
    except read_errors(path) as error:
        raise read_error(path, error, path) from None
    if not lines:
        raise UserError(f"{path}: empty (expected one text a line)")
    if reason := not_text(lines[0][:4096]):
        raise UserError(f"{path}: {reason[:-1]}; a compressed file ends in {', '.join(COMPRESSIONS)})")
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: {not_utf8(line, error)}") from None
    if not any(map(str.strip, texts)):
        raise UserError(f"{path}: has no text, only blank lines (expected one text a line)")
    return texts


def check_out(path):
    """Raises: UserError, before any work, unless a .npy file can be written there."""
    directory = os.path.dirname(path) or "."
    if not path.endswith(".npy"):
        raise UserError(f"--out={path}: not a .npy file (np.load reads it; expected a name that ends in .npy)")
    if os.path.isdir(path) or not os.path.isdir(directory):
        raise UserError(f"{path}: {'a directory' if os.path.isdir(path) else f'No such directory: {directory}'}")
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
        raise UserError(f"{path}: Permission denied")


@command
def main(argv):
    cfg = load_config(FillMaskConfig, argv)
    if not cfg.checkpoint:
        raise UserError("--checkpoint: not given (a run directory, such as out/smoke)")
    if bool(cfg.text) == bool(cfg.embed):
        raise UserError("give either --text or --embed")
    for name in ("out", "normalize"):
        if cfg.text and getattr(cfg, name):
            raise UserError(f"--{name}: means nothing with --text (only with --embed)")
    if cfg.embed and not cfg.out:
        raise UserError("--out: not given (a .npy file for the vectors)")
    if cfg.embed:
        check_out(cfg.out)
    try:
        cfg.text.encode()
    except UnicodeEncodeError:  # the command line's bytes
        raise UserError("--text: not UTF-8 (is it the terminal's encoding?)") from None
    texts = read_lines(cfg.embed) if cfg.embed else []
    warn_of_lost_texts(cfg.embed, [Row(i, i + 1, [text]) for i, text in enumerate(texts)], num_texts=0)  # any word is a text
    if "\ufffd" in cfg.text:
        print("warning: --text: holds U+FFFD: characters were lost before they came here (type it again)", flush=True)
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
        return fill_mask(model, tokenizer, special, cfg.text, device, config)
    sequences = token_ids(model, tokenizer, special, texts, config, how["max_tokens"])
    if unknown := sum(special["[UNK]"] in ids for ids in sequences):
        print(f"{unknown:,} of {len(texts):,} texts have words that are not in the vocabulary: the model sees [UNK]")
    vectors = embed(model, sequences, device, cfg.normalize or how["normalize"], how["pooling"])
    contents = io.BytesIO()  # np.save to a file says nothing of why it failed
    np.save(contents, vectors)
    with whole_file(cfg.out) as file:
        file.write(contents.getbuffer())
    print(f"{cfg.out}: {len(vectors)} vector{'s' * (len(vectors) > 1)} of {vectors.shape[1]}")


if __name__ == "__main__":
    main()
