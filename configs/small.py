"""A two-layer MosaicBERT, to compare vocabularies, data or recipes in minutes on one CPU core.

    python train.py configs/small.py --data_dir=data/mine --max_steps=2000

Size   2,460,800 parameters with a vocabulary of 16,384 entries; 4,285,376 with BERT's 30,522
Work   32 samples of at most 128 tokens per step

Used in docs/data.md, "A vocabulary of your own".
"""

out_dir = "out/small"

# Model
model = "mosaicbert"
hidden_size = 128
num_layers = 2
num_heads = 2  # head size 64
intermediate_size = 256
hidden_dropout = 0.0

# Data: whole documents, cut into samples
seq_length = 128
chunk = True
mask_prob = 0.3

# Optimizer. A small model tolerates a high learning rate; post-LN needs hundreds of steps of warm-up.
global_batch_size = 32
lr = 3e-3
weight_decay = 0.02
schedule = "linear"
warmup_fraction = 0.1
final_lr_fraction = 0.0

eval_interval = 500
checkpoint_interval = 500
