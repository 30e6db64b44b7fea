# make install | demo | test | parity | lint | clean. Needs Python 3.10 or newer and a package registry.
#
#   PYTHON=python3.12        the interpreter that .venv is made with
#   VENV=/path/to/env        use another environment (a Detectron2 that is in it is kept)
#   TORCH_INDEX=URL          take torch and torchvision from this index (a CPU-only or CUDA one)
#   DETECTRON2=git           build Detectron2 from its repository instead of using the wheel
#   DETECTRON2_GIT=URL       that repository, in pip's form
#   WORKERS=2                how many processes, of one thread each, run the tests
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
DETECTRON2 ?= wheel
DETECTRON2_GIT ?= git+https://github.com/facebookresearch/detectron2.git
WORKERS ?= 2

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check
installed := $(VENV)/.mcibi_d2-installed
has_detectron2 = $(python) -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("detectron2"))'

.PHONY: install demo test parity lint clean

install: $(installed)

$(installed): pyproject.toml .ci/detectron2.txt
	@test -x $(python) || $(PYTHON) -m venv $(VENV)
	@$(python) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		f"mcibi_d2 needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}")'
	$(pip) install --quiet torch torchvision $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(pip) install --quiet --editable '.[dev]'
	@if $(has_detectron2); then echo "Detectron2 is already there: kept."; else \
		$(MAKE) --no-print-directory detectron2-$(DETECTRON2); fi
	@$(python) -c 'import mcibi_d2'
	@touch $@

# The wheel is tagged for Python 3.10, but its Python files run on 3.10 to 3.13, and its compiled
# part is not needed by this project. pip checks the pinned hash. The wheel also holds a stray
# top-level package "tools", which does not belong in an environment; it is unpacked apart and
# only Detectron2 moves in.
.PHONY: detectron2-wheel detectron2-git
detectron2-wheel:
	rm -rf $(VENV)/detectron2-wheel
	$(pip) install --quiet --no-deps --require-hashes --only-binary=:all: --python-version 3.10 \
		--target $(VENV)/detectron2-wheel --requirement .ci/detectron2.txt
	cd $(VENV)/detectron2-wheel && mv detectron2 sal_detectron2-*.dist-info \
		"$$($(abspath $(python)) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	rm -rf $(VENV)/detectron2-wheel

detectron2-git:
	$(pip) install --quiet setuptools wheel ninja
	$(pip) install --no-build-isolation '$(DETECTRON2_GIT)'

demo: $(installed)
	PYTHONWARNINGS=ignore::FutureWarning $(python) -m mcibi_d2.tools.quickstart --output output/demo

test: $(installed)
	OMP_NUM_THREADS=1 $(python) -m pytest tests --numprocesses $(WORKERS) --dist worksteal

# The released networks: with them, tests/test_released.py compares the converted models.
parity: $(installed)
	$(pip) install --quiet --editable '.[parity]'

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .

clean:
	rm -rf .venv output/demo build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
