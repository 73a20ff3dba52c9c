"""A small MosaicBERT on the English text inside every Python, in about 90 seconds on two CPU cores: `make smoke`.

Data   python prepare_c4.py --source=stdlib --train_tokenizer=2048 --val_fraction=0.05 --out=data/smoke
Size   611,456 parameters
Work   600 steps x 64 samples of at most 64 tokens: about 1.6e6 tokens, three times through the corpus
Result 25 % accuracy on held-out masked tokens, almost five times that of always guessing the most frequent one

Not a recipe for anything larger: a tiny model has a high learning rate and no dropout.
"""

data_dir = "data/smoke"
out_dir = "out/smoke"
seed = 17

# Model
model = "mosaicbert"
hidden_size = 128
num_layers = 2
num_heads = 4  # head size 32
intermediate_size = 256
hidden_dropout = 0.0

# Data: whole documents, cut into samples
seq_length = 64
chunk = True
mask_prob = 0.3

# Optimizer
global_batch_size = 64
max_steps = 600
lr = 4e-3
weight_decay = 0.02
schedule = "linear"
warmup_fraction = 0.06
final_lr_fraction = 0.0

eval_interval = 300
checkpoint_interval = 300
