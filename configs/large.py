"""MosaicBERT-Large.

    torchrun --nproc_per_node=8 train.py configs/large.py

Data   python prepare_c4.py --source=c4 --out=data/c4 --max_doc_tokens=126
Size   435,221,312 parameters
Work   70,000 steps x 4,096 samples of at most 128 tokens: at most 36.7e9 tokens, 3.5 times the FLOPs of base.py
Cost   the original's blog reports 83.2 on GLUE after 15.85 h and 85.5 after about 60 h on eight A100-80GB; the number
       of steps for 85.5 is not published
Score  not measured here

The original published no settings for Large. Its blog says: like Base, except for the sizes. The authors advise a lower
learning rate (mosaicml/examples, issue 236), and used 2e-4 for BERT-Large in their study of masking (arXiv 2305.15096).
"""

data_dir = "data/c4"
out_dir = "out/large"
seed = 17

# Model: sizes of bert-large-uncased
model = "mosaicbert"
hidden_size = 1024
num_layers = 24
num_heads = 16  # head size 64
intermediate_size = 4096  # gives the 434 M parameters reported elsewhere, without the head
hidden_dropout = 0.1
attention_dropout = 0.0

# Data, as in base.py
seq_length = 128
chunk = False
mask_prob = 0.3

# Optimizer. weight_decay is the original's 1e-5 divided by the peak learning rate: see base.py.
global_batch_size = 4096
max_steps = 70_000
lr = 2e-4
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.05  # 1e-5 / 2e-4
schedule = "linear"
warmup_fraction = 0.06
final_lr_fraction = 0.0

eval_interval = 2000
checkpoint_interval = 1000
