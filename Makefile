# Needs Python 3.11 or newer, make and git; everything else goes into .venv.
#
#   make demo                        build an INT8 bundle of the model that ships with qdm-deploy, and sample from it
#   make test                        the default test suite
#   make demo PYTHON=python3.12      another interpreter (.venv is made anew when its version differs)
#   make demo TORCH_INDEX=<url>      take torch from this package index instead of the default one, which on Linux serves
#                                    the CUDA build (several GB with its libraries); PyTorch's own index has a CPU build

PYTHON ?= python3
TORCH_INDEX ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check install
QUIETLY := | sed -u '/^Requirement already satisfied/d'
QDM := $(VENV)/bin/qdm-deploy
RUN_EXTRAS := build,openvino,tensorrt-rtx,serve
DEV_EXTRAS := $(RUN_EXTRAS),ray,dev

# The version is part of the stamps' names, so that another PYTHON is noticed.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)
RUN_READY := $(VENV)/.ready-run-$(PYTHON_VERSION)
DEV_READY := $(VENV)/.ready-dev-$(PYTHON_VERSION)

.PHONY: help setup setup-dev demo test test-slow check lock image image-lock image-test clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile
	@echo "Other targets: setup setup-dev test-slow check lock image image-lock image-test clean"

# ------------------------------------------------------------------------------------------------------------- set-up

# $(call require-python) stops with the reason when PYTHON cannot make the environment.
define require-python
	@case "$(PYTHON_VERSION)" in \
	  none) echo "There is no Python at '$(PYTHON)'. Name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1 ;; \
	  2.*|3.[0-9]|3.10) echo "'$(PYTHON)' is Python $(PYTHON_VERSION); qdm-deploy needs 3.11 or newer. Name another: make PYTHON=python3.12 ..." >&2; exit 1 ;; \
	esac
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its ensurepip or venv module is missing." >&2; \
	  echo "On Debian and Ubuntu: apt-get install python$(PYTHON_VERSION)-venv" >&2; exit 1; }
endef

# .incomplete stands in the environment while it is written to: an environment that was cut off is never built upon.
define prepare-venv
	@if [ -e $(VENV)/.incomplete ]; then echo "An earlier set-up of $(VENV) was cut off: starting again."; rm -rf $(VENV); fi
	@if [ -d $(VENV) ] && [ "$$($(VENV)/bin/python -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$(PYTHON_VERSION)" ]; then \
	  echo "$(VENV) is not a working Python $(PYTHON_VERSION) environment: making it anew."; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.incomplete
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
endef

# torch comes alone and first: what follows finds it installed and takes it, from whichever index it came. The build backends
# (ours, and setuptools for tensorrt_rtx, which is published as source: the one that venv brings is too old to make a wheel)
# are installed too, rather than fetched into an isolated environment, so that constraints.txt pins them as well.
$(RUN_READY): pyproject.toml constraints.txt $(VENV)/bin/python
	$(require-python)
	$(prepare-venv)
	$(PIP_INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt) $(QUIETLY)
	$(PIP_INSTALL) --constraint constraints.txt hatchling setuptools $(QUIETLY)
	$(PIP_INSTALL) --constraint constraints.txt --no-build-isolation --editable '.[$(RUN_EXTRAS)]' $(QUIETLY)
	@rm $(VENV)/.incomplete && touch $@

$(DEV_READY): $(RUN_READY)
	@touch $(VENV)/.incomplete
	$(PIP_INSTALL) --constraint constraints.txt --no-build-isolation --editable '.[$(DEV_EXTRAS)]' $(QUIETLY)
	@rm $(VENV)/.incomplete && touch $@

# No recipe: an interpreter that is missing, or gone from behind its link, makes the stamps out of date.
$(VENV)/bin/python: ;

setup: $(RUN_READY)

setup-dev: $(DEV_READY)

# --------------------------------------------------------------------------------------------------------------- use

demo: $(RUN_READY)
	$(QDM) build --int8 --out demo/fashion.qdm --force
	$(QDM) generate demo/fashion.qdm -n 16 --steps 50 --sampler ddim --seed 0 --out demo/images --force
	@echo
	@echo "images: demo/images/"
	@echo "report: demo/fashion.qdm/report.html"

test: $(DEV_READY)
	$(VENV)/bin/python -m pytest -m "not slow"

test-slow: $(DEV_READY)
	$(VENV)/bin/python -m pytest -m slow

check: $(DEV_READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

# ----------------------------------------------------------------------------------------------------- container images

# TARGET is cpu, gpu or build; docker/README.md has the rest. CONTAINERS is docker, podman or buildah.
CONTAINERS ?= docker
TARGET ?= cpu
TENSORRT ?= tensorrt
TORCH ?= cpu
BASE_IMAGE ?=
WHEELHOUSE := $(subst gpu,gpu-$(TENSORRT),$(subst build,build-$(TORCH),$(TARGET)))

image:
	PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) docker/wheelhouse.sh $(WHEELHOUSE)
	$(CONTAINERS) build --file docker/Dockerfile --target $(TARGET) --tag qdm-deploy:$(TARGET) \
	  --build-arg TENSORRT=$(TENSORRT) --build-arg TORCH=$(TORCH) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	  --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) --build-arg REVISION=$$(git rev-parse HEAD || echo unknown) .

image-test: $(RUN_READY)
	docker/test_image.sh

# Of constraints.txt and the extras: after `make lock`, and after a change of pyproject.toml.
image-lock:
	PYTHON=$(PYTHON) docker/lock.sh $(if $(TORCH_INDEX),--index $(TORCH_INDEX))

# ---------------------------------------------------------------------------------------------------------- upkeep

# Resolves pyproject.toml's bounds anew in an empty environment. The lowest supported Python, so that newer ones find
# every pin too; local version labels and the CUDA build's own libraries are left out, so that either build of torch fits.
LOCK := build/lock
lock:
	$(require-python)
	@[ "$(PYTHON_VERSION)" = 3.11 ] || { echo "The lock is made with Python 3.11; '$(PYTHON)' is $(PYTHON_VERSION): make lock PYTHON=python3.11" >&2; exit 1; }
	rm -rf $(LOCK) && $(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/python -m pip install --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$($(PYTHON) -c 'import tomllib; \
	  extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	  print(next(r for r in extras["build"] if r.startswith("torch")))')"
	$(LOCK)/bin/python -m pip install '.[$(DEV_EXTRAS)]'
	{ echo "# Made by 'make lock' (Python 3.11): do not edit."; \
	  $(LOCK)/bin/python -m pip list --format=freeze --exclude pip --exclude qdm-deploy \
	  | sed 's/+.*//' | grep -Ev '^(cuda[-_]toolkit|nvidia|triton)[-_=]' | LC_ALL=C sort -f; } > $(LOCK)/constraints.txt
	mv $(LOCK)/constraints.txt constraints.txt
	rm -rf $(LOCK)

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find qdm_deploy calibration export tests -name __pycache__ -type d -prune -exec rm -rf {} +
