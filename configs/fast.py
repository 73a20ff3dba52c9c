"""MosaicBERT-Base in minutes: base.py's model, trained with less of everything. For a GPU of Ada, Hopper or newer.

    python train.py configs/fast.py --data_dir=data/mine --budget_minutes=8

Data   python prepare_c4.py --source=my_texts/ --train_tokenizer=32768 --out=data/mine
Size   137,400,384 parameters with BERT's vocabulary; checkpoints and exports are like base.py's
Work   512 samples of at most 128 tokens per step; 2,872 steps in four minutes on an H200
Cost   $0.17 for these four minutes, at $2.50 per GPU-hour
Score  held-out loss 2.447 after them. With equal minutes it has not been compared with base.py yet: docs/results.md

What differs from base.py, and why. All figures are from one H200, one pretraining seed each (results/README.md, recipe_h200):

optimizer   Muon. After 2.4 minutes the held-out loss is 2.93, AdamW's 3.01, and STS-B 61.5 instead of 45.0.
lr          1e-3. In 70 seconds 2e-3 gave 3.40 instead of 3.36, 4e-3 5.72; in 2.4 minutes 5e-4 gave 3.04 instead of 2.82.
dropout     None: 2.447 instead of 2.543 after four minutes, CoLA 31.6 instead of 28.0, STS-B 75.1 instead of 76.6. Fine-tuning
            then has none either: dropout that the weights have never seen cost CoLA half of its score at a high learning rate.
fp8         A step is 1.3 times as fast, and the loss after equal steps 0.01 higher, less than seeds differ. --fp8=false turns it
            off, as older GPUs need.
batch       512 samples instead of 4,096, since minutes have too few steps of 4,096. 256 are slower by Python's work.
warm-up     300 steps instead of 4,200: a share of minutes would be too short for post-LN, and Muon needs no more.
chunk       True: whole documents, cut into samples. Base reads the first 126 tokens of each, which only a corpus like C4 affords.
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
hidden_dropout = 0.0
attention_dropout = 0.0

# Data
seq_length = 128
chunk = True
mask_prob = 0.3

# Optimizer
global_batch_size = 512
max_steps = 2872  # unless there is a budget
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
checkpoint_interval = 1000
