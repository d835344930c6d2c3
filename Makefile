# make quickstart   train the embedded default on real sound and compare it with the untrained model
# make test         what CI runs; the others: see CONTRIBUTING.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(sort $(wildcard plugins/*))
QUICKSTART := examples/quickstart
PARITY := basic_pitch emotion2vec mert panns speaker spidr

.PHONY: soak fuzz test-editor test-wheels audit quickstart test lint docs parity test-crash test-formats test-qlora test-deepspeed test-lmms test-vllm test-own-env test-compile test-web test-docs bench bench-growth bench-experts bench-data bench-train bench-prefill bench-startup bench-server paper-experts setup weights clean

quickstart: setup weights
	$(BIN)/coatkit train $(QUICKSTART)/spec.yaml --resume
	$(BIN)/python $(QUICKSTART)/compare.py $(QUICKSTART)/runs/quickstart $(QUICKSTART)/heldout.jsonl

test: setup weights
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of the documentation, in site/: open site/index.html. It reads without a network, and so does its search.
docs: setup .docs/.installed
	NO_MKDOCS_2_WARNING=1 .docs/bin/python -m mkdocs build --strict

.docs/.installed: docs/requirements.txt $(VENV)/.installed
	$(PYTHON) -m venv .docs
	echo "import site; site.addsitedir('$$($(BIN)/python $(PLACE))')" > $$(.docs/bin/python $(PLACE))/beside.pth
	.docs/bin/python -m pip install -q --no-deps -r docs/requirements.txt
	touch $@

# Compare every expert with the package it stands for, which runs in an environment of its own (.parity). Writes the
# table in docs/experts.md. HOME is moved, because panns-inference writes into it when it is imported.
parity: setup .parity/.installed
	@set -e; mkdir -p .parity/home; for name in $(PARITY); do \
	  HOME=$(CURDIR)/.parity/home .parity/bin/python tests/parity/run.py dump $$name .parity/work/$$name; \
	  $(BIN)/python tests/parity/run.py compare $$name .parity/work/$$name; \
	done
	$(BIN)/python tests/parity/run.py table .parity/work docs/experts.md

.parity/.installed: tests/parity/requirements.txt tests/parity/packages.txt
	$(PYTHON) -m venv .parity
	.parity/bin/python -m pip install -q -r tests/parity/requirements.txt
	.parity/bin/python -m pip install -q --no-deps --ignore-requires-python -r tests/parity/packages.txt
	.parity/bin/python -m pip download -q --no-deps -d .parity/wheels Resemblyzer==0.1.4
	touch $@

# Kill trainers and writers 110 times, and compare what comes out with what nobody killed; a quarter of an hour. Writes the
# table in docs/reliability.md.
test-crash: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/crash/matrix.py --kills 110 --write docs/reliability.md

# Spoiled specs, rows, sounds, runs, stores and plugins by the thousand: FUZZ="--cases 4000 --seed 1". Writes the table in
# docs/reliability.md; a quarter of an hour.
FUZZ ?= --cases 4000
fuzz: setup
	$(BIN)/python tests/fuzz/run.py $(FUZZ) --write docs/reliability.md

# A long small run, whose memory, open files, rows and features are watched (docs/reliability.md); STEPS=N for its length, and
# two hundred requests at once on the demo.
STEPS ?= 4000
soak: setup .web/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/soak.py --steps $(STEPS) --write docs/reliability.md
	OMP_NUM_THREADS=1 .web/bin/python -m pytest -m web -s tests/web/test_demo_load.py

# Read what lhotse and datasets write today, in an environment of their own (.formats).
test-formats: setup .formats/.installed
	rm -rf .formats/work
	HF_HUB_OFFLINE=1 .formats/bin/python tests/formats/write.py .formats/work
	$(BIN)/python -m pytest tests/test_formats_real.py

.formats/.installed: tests/formats/requirements.txt
	$(PYTHON) -m venv .formats
	.formats/bin/python -m pip install -q -r tests/formats/requirements.txt
	touch $@

# What extras bring is tested in environments of their own (.qlora, .deepspeed): .venv with the extra's package on top.
test-qlora: setup .qlora/.installed
	OMP_NUM_THREADS=1 .qlora/bin/python -m pytest tests/test_qlora.py

test-deepspeed: setup .deepspeed/.installed
	PATH="$(CURDIR)/.deepspeed/bin:$$PATH" OMP_NUM_THREADS=1 .deepspeed/bin/python -m pytest tests/test_deepspeed.py

# lmms-eval's own command asks a run. Of its 130 packages the 30 are there that it imports to run these tests.
test-lmms: setup .lmms/.installed
	OMP_NUM_THREADS=1 .lmms/bin/python -m pytest tests/lmms plugins/coatkit-eval-lmms

# Exported runs in vLLM against transformers, in vLLM's own environment (.vllm). Writes the table in docs/serving.md.
test-vllm: setup .vllm/.installed
	rm -rf .vllm/work && OMP_NUM_THREADS=1 $(BIN)/python tests/vllm/make.py .vllm/work
	COATKIT_VLLM_WORK=$(CURDIR)/.vllm/work COATKIT_VLLM_COMMAND=$(CURDIR)/$(BIN)/coatkit PYTHONPATH=tests/vllm/startup \
	  OMP_NUM_THREADS=1 .vllm/bin/python -m pytest --confcutdir=tests/vllm -p no:cacheprovider tests/vllm
	$(BIN)/python tests/vllm/table.py .vllm/work docs/serving.md

# torchaudio and torchcodec come built for another torch than vLLM's, and fail when they are imported.
.vllm/.installed: tests/vllm/requirements.txt
	$(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip install -q -r tests/vllm/requirements.txt
	.vllm/bin/python -m pip uninstall -q -y torchaudio torchcodec
	.vllm/bin/python -m pip install -q --no-deps -e plugins/coatkit-serve-vllm
	touch $@

# gradio brings a Pillow older than .venv's; so it is here, as people get it from the extra `demo`.
.web/.installed: PACKAGES := playwright==1.65.2 greenlet==3.5.6 gradio==6.31.0 gradio-client==2.7.2 hf-gradio==0.4.1 \
  brotli==1.2.1 fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 groovy==0.1.2 httpx==0.28.1 httpcore==1.0.9 \
  opentelemetry-api==1.45.2 orjson==3.13.0 pandas==3.1.1 pillow==12.3.0 pydub==0.25.1 python-multipart==0.0.34 pytz==2026.6 \
  safehttpx==0.1.7 semantic-version==2.10.0 tomlkit==0.14.0
.qlora/.installed: PACKAGES := bitsandbytes==0.50.2
.lmms/.installed: PACKAGES := lmms-eval==0.7.3 datasets==5.2.0 evaluate==0.4.6 pandas==3.1.1 dill==0.4.1 multiprocess==0.70.19 \
  xxhash==4.1.0 aiohttp==3.14.5 aiohappyeyeballs==2.7.1 aiosignal==1.4.0 attrs==26.1.0 frozenlist==1.8.0 multidict==7.2.1 \
  propcache==0.5.4 yarl==1.25.1 loguru==0.7.3 tenacity==9.2.1 editdistance==0.8.1 zhconv==1.4.3 pytablewriter==1.2.1 \
  DataProperty==1.1.1 mbstrdecoder==1.1.5 pathvalidate==3.3.1 tabledata==1.3.5 tcolorpy==0.1.7 typepy==2.0.0 chardet==7.7.0 \
  six==1.17.0 pytz==2026.6
.deepspeed/.installed: PACKAGES := deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
PLACE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.qlora/.installed .deepspeed/.installed .web/.installed .lmms/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PLACE))')" > $$($(@D)/bin/python $(PLACE))/beside.pth
	$(@D)/bin/python -m pip install -q --no-deps setuptools wheel
	DS_ACCELERATOR=cpu $(@D)/bin/python -m pip install -q --no-deps --no-build-isolation $(PACKAGES)
	touch $@

# Run an expert whose package cannot be installed beside coatkit: basic-pitch with its old TensorFlow, in an environment of
# its own (.own-env), into the feature store.
test-own-env: setup .own-env/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_own_environment.py

.own-env/.installed: tests/own_env/requirements.txt
	$(PYTHON) -m venv .own-env
	.own-env/bin/python -m pip install -q -r tests/own_env/requirements.txt
	touch $@

# Specs in a YAML language server, as editors run it (.editor; needs node and npm).
test-editor: setup .editor/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/editor

.editor/.installed:
	npm install --silent --no-fund --no-audit --prefix .editor yaml-language-server@1.25.0
	touch $@

# Every package as sdist and wheel, and installed from wheels alone into environments that have no other coatkit (.wheels).
test-wheels: setup .wheels/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/wheels tests/test_new.py

.wheels/.installed:
	$(PYTHON) -m venv .wheels
	.wheels/bin/python -m pip install -q build==1.6.1 setuptools==84.2.1 wheel
	touch $@

# Pages in a browser: playwright with the Chromium of this machine (or that named by CHROMIUM), and none that is fetched.
test-web: setup .web/.installed docs
	OMP_NUM_THREADS=1 .web/bin/python -m pytest -m web tests/web

# All that the documentation shows; `make test` leaves out what takes longest.
test-docs: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/test_docs.py tests/test_docs_blocks.py

# Licences of everything that is installed, into docs/dependencies.md; and known vulnerabilities, which needs the network.
audit: setup
	$(BIN)/python docs/tools/licences.py --write
	test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/python -m pip install -q pip-audit==2.10.1; }
	.audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# The language model's layers compiled: the same losses and gradients; needs a C++ compiler.
test-compile: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_compile.py

# Throughput of every expert against upstream's own call, in one run; needs `make parity` before.
bench-experts: setup
	HOME=$(CURDIR)/.parity/home $(BIN)/python benchmarks/experts.py

# Opening, planning and drawing 16 k to 1.6 M rows. Writes the table in docs/data.md.
bench-data: setup
	$(BIN)/python benchmarks/data.py

# All of them, one after the other; about an hour on two cores with nothing else running.
bench: bench-startup bench-data bench-prefill bench-growth bench-train

# How a training step grows with tokens, rows, experts and the manifest. Writes its table in docs/performance.md.
bench-growth: setup weights
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/growth.py

# A training step against the bare language model and against a plain implementation; about half an hour.
bench-train: setup weights
	$(BIN)/python benchmarks/train_step.py --write

# Time to the first token with the thinking block and without; how long commands take to start.
bench-prefill: setup weights
	$(BIN)/python benchmarks/prefill.py
bench-startup: setup
	$(BIN)/python benchmarks/startup.py

# The same on vLLM, with its own benchmark: two servers of the default backbone. Writes its table in docs/serving.md.
bench-server: setup weights .vllm/.installed
	$(BIN)/python benchmarks/server.py

# A few steps with all six experts at full size; random weights, because their checkpoints are not fetched here.
paper-experts: setup
	rm -rf examples/runs/paper-experts
	$(BIN)/coatkit train examples/paper-experts.yaml --set backbone.weights=random \
	  --set experts.spidr.weights=random --set experts.panns.weights=random \
	  --set experts.emotion2vec.weights=random --set experts.mert.weights=random \
	  --set stages.0.steps=2 --set stages.1.steps=4

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "coatkit needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e .[dev] $(PLUGINS:%=-e ./%)
	touch $@

weights: setup
	$(BIN)/coatkit fetch mini

clean:
	rm -rf $(VENV) .parity .formats .qlora .deepspeed .own-env .web .lmms .vllm .audit .docs site .editor .wheels build dist *.egg-info plugins/*/src/*.egg-info
