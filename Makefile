# Two commands: `make train` and `make test`. Both set up .venv when it is not there yet.
PYTHON ?= python3
BIN := .venv/bin
RUN := outputs/aurora-tiny-$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test lint bench clean

train: .venv/installed
	$(BIN)/python train.py experiment=aurora-tiny trainer.max_steps=700 callbacks.ema.decay=0.97 output_dir=$(RUN)
	$(BIN)/python evaluate.py tokenizer=aurora-tiny weights=$(RUN)/tokenizer.safetensors data=scenes output_dir=$(RUN)/evaluation
	@echo "table: $(RUN)/evaluation/metrics.json   picture: $(RUN)/evaluation/reconstructions.png"

test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	for script in $(filter-out benchmarks/precision.py benchmarks/scaling.py benchmarks/memory_over_time.py,$(wildcard benchmarks/[!_]*.py)); do $(BIN)/python $$script || exit 1; done

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off -e '.[dev,render]'
	touch $@

clean:
	rm -rf .venv outputs
