.PHONY: help setup demo serve stop model experiments pictures bench gpu-check have-gpu check test test-fast floors \
	gpu-versions lint constraints
.DEFAULT_GOAL := help

PYTHON ?= python3
PORT ?= 8000
VENV := .venv
RUN := runs/demo
# The bundled Fashion-MNIST model.
BUNDLED := models/fashion-mnist.onnx
# Its checkpoint, which make model leaves; the plain net lies beside it.
CHECKPOINT ?= runs/model/checkpoint.pt
BIN := $(VENV)/bin
# In the order in which make bench runs them.
BENCHMARKS := $(wildcard $(patsubst %,bench/%.py,model folding reparameterized training server startup reliability))
# The TensorRT-RTX extra builds engines without a GPU; its wheels exist for Linux and Windows on x86-64.
EXTRAS ?= $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),dev$(,)rtx,dev)
, := ,
# Otherwise pyright asks its registry for a newer version at every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make .venv and install everything into it

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): PyTorch is several GB, this takes minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: setup ## train, fold, export, prove and serve digits; show the Fashion-MNIST model beside it
	@$(BIN)/python train/run.py --out $(RUN) $(if $(wildcard $(RUN)/checkpoint.pt),--resume)
	@$(BIN)/python fold/run.py $(RUN)
	@$(BIN)/python export/to_onnx.py $(RUN)/plain.safetensors
	@$(BIN)/python export/to_trt.py $(RUN)/plain.onnx
	@$(BIN)/python export/parity.py $(RUN)/plain.onnx --against $(RUN)/best.pt $(RUN)/plain.safetensors
	@$(BIN)/python train/held_out.py --out $(RUN)/held-out
	@$(BIN)/python serve/demo.py $(RUN)/plain.onnx --images $(RUN)/held-out --port $(PORT)
	@$(BIN)/python serve/demo.py $(BUNDLED) --images models/held-out --port $$(($(PORT) + 1))

serve: setup ## serve the demo's net until Ctrl-C
	@test -f $(RUN)/plain.onnx || { echo "error: $(RUN)/plain.onnx is missing: run make demo first" >&2; exit 2; }
	@$(BIN)/python serve/run.py $(RUN)/plain.onnx --port $(PORT)

stop: setup ## stop the servers that make demo left running
	@$(BIN)/python serve/demo.py $(RUN)/plain.onnx --stop
	@$(BIN)/python serve/demo.py $(BUNDLED) --stop

model: setup ## train the Fashion-MNIST model in models/ again: over an hour on two cores
	@$(BIN)/python train/run.py --dataset fashion-mnist --width 2 --nonlinearity relu --epochs 40 \
		--label-smoothing 0.1 --crop 2 --erase 0.5 --validation 0.02 --out runs/model \
		$(if $(wildcard runs/model/checkpoint.pt),--resume)
	@$(BIN)/python fold/run.py runs/model/checkpoint.pt
	@$(BIN)/python export/to_onnx.py runs/model/plain.safetensors --out $(BUNDLED)
	@$(BIN)/python export/parity.py $(BUNDLED) --report $(BUNDLED:.onnx=.json) \
		--against runs/model/checkpoint.pt runs/model/plain.safetensors
	@$(BIN)/python export/to_onnx.py runs/model/plain.safetensors --precision int8 --out $(BUNDLED:.onnx=-int8.onnx)
	@$(BIN)/python train/held_out.py --dataset fashion-mnist --out models/held-out

experiments: setup ## run all experiments of docs/paper.md in their cheap form: minutes each on two cores
	@for name in delta depth parameterization scaling sparsity convergence initialization; do \
		$(BIN)/python train/experiments/$$name.py --out docs/experiments || exit; done

pictures: setup ## draw docs/pictures again, from models/ and the checkpoint of make model
	@test -f $(CHECKPOINT) || { echo "error: $(CHECKPOINT) is missing: run make model, or name one with CHECKPOINT=" >&2; exit 2; }
	@$(BIN)/python fold/draw.py $(CHECKPOINT) --out docs/pictures/fold.png
	@$(BIN)/python export/draw.py $(BUNDLED) --out docs/pictures/graph.svg
	@$(BIN)/python export/parity.py $(BUNDLED) --plot docs/pictures/parity.png \
		--against $(CHECKPOINT) $(dir $(CHECKPOINT))plain.safetensors
	@$(BIN)/python export/evaluate.py $(BUNDLED) --out $(dir $(CHECKPOINT))report
	@cp $(dir $(CHECKPOINT))report/confusion.png $(dir $(CHECKPOINT))report/reliability.png docs/pictures/

bench: setup ## the short form of most benchmarks, some eight minutes, into runs/bench; full figures are in docs/benchmarks
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS),bench]'
	@for script in $(BENCHMARKS); do $(BIN)/python $$script --quick --out runs/bench || exit; done

gpu-check: have-gpu setup ## with an NVIDIA GPU: build engines, run tests/gpu, compare, time; writes docs/gpu-NAME.md
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS),tensorrt]'
	@$(BIN)/python bench/gpu_check.py

have-gpu:
	@command -v nvidia-smi >/dev/null || { echo "error: nvidia-smi is missing: make gpu-check needs an NVIDIA GPU \
	and its driver; python bench/gpu_check.py --device cpu measures the CPU" >&2; exit 2; }

check: setup ## lint, format and types, as CI sees them; changes nothing
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/pyright

test: check ## check, then run all tests
	@$(BIN)/python -m pytest

test-fast: setup ## run the tests that take less than half a second each, on all cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

FLOORS := runs/floors
floors: setup ## run the server's quick tests with the lowest versions that pyproject.toml allows, but today's PyTorch
	@test -x $(FLOORS)/bin/python || $(BIN)/python -m venv $(FLOORS)
	@$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check $$($(BIN)/python tests/floors.py)
	@# PyTorch and what the tests need are found in .venv, behind the lowest versions.
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(FLOORS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth
	@$(FLOORS)/bin/python -m pytest tests/serve tests/test_layout.py -m "not slow" -o filterwarnings=

GPU_VERSIONS := runs/gpu-versions
PYTHON312 ?= python3.12
gpu-versions: ## run the quick tests with the versions of a bare GPU machine, on Python 3.12: installs 5 GB
	@command -v $(PYTHON312) >/dev/null || { echo "error: $(PYTHON312) is missing: name one with PYTHON312=" >&2; exit 2; }
	@test -x $(GPU_VERSIONS)/bin/python || $(PYTHON312) -m venv $(GPU_VERSIONS)
	@$(GPU_VERSIONS)/bin/python -m pip install --quiet --disable-pip-version-check -r bench/gpu-image.txt
	@OMP_NUM_THREADS=1 $(GPU_VERSIONS)/bin/python -m pytest tests/common tests/train tests/fold tests/export tests/serve tests/bench \
		-m "not slow" --numprocesses auto --dist loadfile

lint: setup ## format and lint
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

constraints: setup ## write the versions in .venv to constraints.txt
	@$(BIN)/python -m pip freeze --exclude-editable \
		| grep -vE '^(editables|hatchling|pathspec|tomlkit|trove-classifiers)=' > constraints.txt
	@# What installs only beside a GPU: the newest version that the code is held against.
	@echo 'tensorrt==11.4.0.106' >> constraints.txt
