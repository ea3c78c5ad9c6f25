# `make demo` and `make test` do all their own set-up on a fresh machine with Python >= 3.11.

PYTHON ?= python3
# The versions this project is tested with; pip's settings decide which build of them comes. Others are
# exported rather than typed once: `make` without them asks pip for these again (a build of the same version stays).
TORCH ?= torch==2.14.1 torchvision==0.29.1
FAISS ?= cpu

BIN := .venv/bin
INSTALLED := .venv/installed
VERSIONS := .venv/versions
ASKED = $(strip $(TORCH) $(FAISS) $(PIP_CONSTRAINT))

.PHONY: install constraints demo test check unit browser faults faults-cache faults-stage-one faults-train distributed compiled bench bench-gpu clean

demo: $(INSTALLED)
	$(BIN)/dkdetr demo

install: $(INSTALLED)

test: check unit

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	PYTHONPATH=. $(BIN)/lint-imports --no-logo

unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The local page in headless Chromium; wants the programs chromium and chromedriver.
browser: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/browser

# Every fault of the cache and its inputs, short and long; tests/faults/README.md lists them.
faults-cache: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" $(addprefix tests/faults/test_,\
		cache_kills.py cache_faults.py cache_writers_and_disks.py \
		hostile_files.py hostile_annotations.py teacher_canary_faults.py)

# Fifty cuts, fifty SIGTERMs, a hundred kills inside a save, ranks that die, losses that break.
faults-train: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/faults/test_train_*.py

faults: faults-cache faults-stage-one faults-train

# Lost workers, failing ranks, SIGTERM while a cache is made.
faults-stage-one: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/faults/test_stage_one_faults.py

# Whatever takes several ranks, the cases too that the default run leaves out.
distributed: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/distributed

# The student compiled, by inductor, too: minutes of C++.
compiled: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -k compile --timeout 1200 \
		tests/unit/test_student_compile.py tests/unit/test_devices_agree.py

# Small sizes on one thread, kept as dated Markdown in tests/benchmarks/results.
bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks --device cpu

# The design's sizes on the GPU at hand. Installs nothing: BENCH_PYTHON=python3 takes one that has
# dkdetr's dependencies and tests/benchmarks/requirements.txt; ONLY="attention step" does some.
BENCH_PYTHON ?= $(BIN)/python
ONLY ?=
bench-gpu:
	$(BENCH_PYTHON) -m tests.benchmarks --device cuda $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT))

# Written where it says something else: other versions than the last time's install anew.
.PHONY: versions
$(VERSIONS): versions
	@mkdir -p .venv
	@echo '$(ASKED)' | cmp -s - $@ || echo '$(ASKED)' > $@

$(INSTALLED): pyproject.toml $(VERSIONS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip uninstall -qq --yes faiss-$(if $(filter gpu,$(FAISS)),cpu,gpu)  # never both
	$(BIN)/python -m pip install --quiet --editable ".[$(FAISS),demo,dev,serve,track,video,export]"
	touch $(INSTALLED)

# Not what `install` takes: an index may lack one of these, a newer Python want newer ones. PyTorch and
# what its builds bring is each machine's choice.
constraints: $(INSTALLED)
	@echo "# Written by 'make constraints' on $$($(BIN)/python -V): what 'make test' passes with." > .venv/constraints
	$(BIN)/python -m pip freeze --exclude-editable > .venv/frozen
	grep -Ev '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' .venv/frozen >> .venv/constraints
	mv .venv/constraints constraints.txt

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
