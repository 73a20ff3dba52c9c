"""MosaicBERT-Base, less of everything: what is best for minutes rather than hours.

    python train.py configs/fast.py --data_dir=data/mine --budget_minutes=8
"""

data_dir = "data/mine"
out_dir = "out/fast"
seed = 17

# Model: base.py's
model = "mosaicbert"
hidden_size = 768
num_layers = 12
num_heads = 12
intermediate_size = 3072
hidden_dropout = 0.1
attention_dropout = 0.0

# Data: whole documents, cut into samples
seq_length = 128
chunk = True
mask_prob = 0.3

global_batch_size = 512
max_steps = 3000
optimizer = "muon"
lr = 1e-3
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.02
schedule = "linear"
warmup_steps = 300
final_lr_fraction = 0.0
fp8 = True

eval_interval = 1000
checkpoint_interval = 2000
keep_checkpoints = 1
