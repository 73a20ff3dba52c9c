"""BERT-Large, the baseline of large.py.

    torchrun --nproc_per_node=8 train.py configs/bert_large.py --compile=true

Data   python prepare_c4.py --source=c4 --out=data/c4 --max_doc_tokens=126
Size   335,174,458 parameters
Work   70,000 steps x 4,096 samples of at most 128 tokens: at most 36.7e9 tokens
Cost   the original's baseline took 23.35 h on eight A100-80GB to reach 83.2 on GLUE
Score  not measured here

Source: MosaicML's study of masking schedules (arXiv 2305.15096), which trained BERT-Large with a learning rate of 2e-4
and otherwise like Base.
"""

data_dir = "data/c4"
out_dir = "out/bert_large"
seed = 17

# Model: that of bert-large-uncased
model = "bert"
hidden_size = 1024
num_layers = 24
num_heads = 16  # head size 64
intermediate_size = 4096
hidden_dropout = 0.1
attention_dropout = 0.1

# Data
seq_length = 128
chunk = False
mask_prob = 0.15

# Optimizer, as in large.py
global_batch_size = 4096
max_steps = 70_000
lr = 2e-4
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.05  # 1e-5 / 2e-4, see base.py
schedule = "linear"
warmup_fraction = 0.06
final_lr_fraction = 0.0

eval_interval = 2000
checkpoint_interval = 1000
