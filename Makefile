# make demo     train and generate on real text, about five minutes        DEMO="--smoke" for a few seconds
# make test     the whole test suite                                       TESTS="tests/test_ops.py -k packed"
# make bench    every op against its peers, the short table              BENCH="--op gated_delta_rule --device cuda"
# make lint     ruff and mypy
# make clean    remove what was built; make distclean removes .venv as well
#
# PYTHON=...    the Python (3.10 or later) that .venv is made from
# NOVENV=1      use PYTHON as it is: installs nothing, builds in the source tree only what is missing
#
# .venv gets the pinned CPU torch, unless there is an NVIDIA driver and PYTHON has a torch with CUDA: then that torch.

PYTHON ?= python3

ifdef NOVENV
PY := $(PYTHON)
READY := in-place
TOOLS :=
export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := .venv/bin/python
READY := .venv/.built
TOOLS := .venv/.tools
endif
INSTALL := $(PY) -m pip install -q --disable-pip-version-check

.PHONY: help demo test bench lint clean distclean in-place
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(READY)
	$(PY) -m memattn demo $(DEMO)

# Two workers with one thread each where pytest-xdist is there.
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest $$($(PY) -c 'import xdist; print("-n 2")' 2>/dev/null) $(TESTS)

bench: $(READY)
	$(PY) bench/run.py $(or $(BENCH),--quick)

lint: $(TOOLS)
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf build dist python/memattn/*.so python/memattn/build.json .venv/.built .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

# Exits 0 if this machine has an NVIDIA driver and PYTHON a torch with CUDA; prints where that torch and its parts lie.
OUTER_TORCH = { test -e /dev/nvidiactl || test -e /dev/dxg; } && $(PYTHON) -c \
  'import sys, torch; assert torch.version.cuda; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")'

# torch is pinned: a looser requirement would take the newest build with gigabytes of CUDA libraries.
.venv/.base: requirements-base.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "memattn needs Python 3.10 or later; $(PYTHON) is not. Try make PYTHON=python3.12"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "installing torch and the tools into .venv (once; a few hundred megabytes)"
	$(INSTALL) --upgrade 'pip>=24,<27'
	if paths=$$($(OUTER_TORCH) 2>/dev/null); then \
	  echo "$$paths" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer-torch.pth"; \
	else \
	  $(INSTALL) -r $<; \
	fi
	@touch $@

.venv/.tools: requirements-dev.txt .venv/.base
	$(INSTALL) -r $<
	@touch $@

.venv/.built: .venv/.tools setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
	@echo "compiling the extensions (up to three minutes on two cores; later only what changed)"
	PYTHONWARNINGS=ignore $(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

in-place:
	@ls python/memattn/_C.abi3.so >/dev/null 2>&1 || $(PY) setup.py -q build_ext --inplace || \
	  echo "memattn: the extensions could not be built here (see above); going on without them"
