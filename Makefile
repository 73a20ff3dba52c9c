# make smoke        pretrain a small MosaicBERT on this machine, fill in a mask, fine-tune
# make test         the test suite on the CPU
# make test-slow    the tests that take longer
# Each creates .venv first. To use the current environment instead:  make test VENV=

VENV = .venv
PYTHON = $(if $(VENV),$(VENV)/bin/python,python3)
INSTALLED = $(if $(VENV),$(VENV)/.installed)
INSTALLED_DEV = $(if $(VENV),$(VENV)/.installed-dev)

SMOKE_TASK = --train_file=data/smoke_task/train.tsv --val_file=data/smoke_task/val.tsv --epochs=2 --lr=1e-3

.PHONY: smoke test test-slow

smoke: $(INSTALLED)
	$(PYTHON) prepare_c4.py --source=stdlib --train_tokenizer=2048 --val_fraction=0.05 --out=data/smoke
	$(PYTHON) train.py configs/smoke.py
	$(PYTHON) -m tools.fill_mask --checkpoint=out/smoke --text="Raises ValueError [MASK] the argument is negative."
	$(PYTHON) -m tools.smoke_task --data_dir=data/smoke --out=data/smoke_task
	@echo "fine-tune to tell which texts had words replaced: from the pretrained weights, then from random ones"
	$(PYTHON) -m tools.finetune_own --checkpoint=out/smoke $(SMOKE_TASK) --out=out/smoke_task
	$(PYTHON) -m tools.finetune_own --checkpoint=out/smoke $(SMOKE_TASK) --random_weights --out=out/smoke_task_random
	@echo "data: data/smoke, data/smoke_task; logs and checkpoints: out/"
	$(if $(VENV),@echo "for the README's commands: source $(VENV)/bin/activate")

test: $(INSTALLED_DEV)
	$(PYTHON) -m pytest -q -n 2 --dist loadfile tests  # two processes; more would disturb tests that start several

test-slow: $(INSTALLED_DEV)
	$(PYTHON) -m pip install -q -r requirements-slow.txt -c constraints.txt
	$(PYTHON) -m pytest -q tests -m slow

$(VENV)/.installed: requirements.txt constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PYTHON) -m pip install -q -r requirements-dev.txt -c constraints.txt
	touch $@
