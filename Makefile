# Everything from nothing: each target first builds the environment it needs in $(VENV).
#   make demo    map a synthetic room and find held-out views in it
#   make test    lint and tests (PYTEST_ARGS adds options)
#   make slow    the tests that take minutes
#   make demo-ros  the same with ROS 2 nodes over DDS: player, mapping, localisation
#   make ros     what the tests of ROS nodes need where no ROS is installed (wheels from PyPI)
#   make bench   measure on the data in FFRECON_DATA, write benchmarks/results and the tables
#   make bench-offline  photos beside COLMAP alone, and the tables
#   make bench-gpu  all that waits for a GPU: benchmarks/gpu_day.sh says what it wants and gives
#   make peers   programs to compare with, in environments of their own (.venv-peers)
#   make config  write config/*.yaml and docs/parameters.md again after a default changed
# On Linux without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Two processes, one thread each: many tests wait for nodes. The files stay whole, in the order
# that test/conftest.py gives them.
PARALLEL ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Small matrices gain nothing from many threads, and a fixed number makes timings comparable.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= $(OMP_NUM_THREADS)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
DEPS := $(VENV)/.dependencies-installed
PACKAGE := $(VENV)/.package-installed
ROS_WHEELS := $(VENV)/.ros-wheels-installed
TF2_MSGS := $(VENV)/.tf2-msgs-installed
TF2_SOURCES := $(wildcard test/ros_support/tf2_msgs/* test/ros_support/tf2_msgs/msg/*)
SOURCES := feedforward_recon launch test benchmarks setup.py

.PHONY: demo demo-ros test lint slow ros bench bench-offline bench-gpu peers config clean
.DELETE_ON_ERROR:

demo: $(PACKAGE)
	$(BIN)/ffrecon demo

demo-ros: $(PACKAGE) ros
	$(BIN)/python -m feedforward_recon.ros.demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' $(PARALLEL) $(PYTEST_ARGS)

lint: $(PACKAGE) ros
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

slow: $(PACKAGE) ros
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

ros: $(ROS_WHEELS) $(TF2_MSGS)

bench: $(PACKAGE)
	$(BIN)/python -m benchmarks.run_all; status=$$?; \
		$(BIN)/python -m benchmarks.tables && exit $$status

bench-offline: $(PACKAGE)
	$(BIN)/python -m benchmarks.run_all offline trees merge photo_growth photo_scale joint moving_photos; status=$$?; \
		$(BIN)/python -m benchmarks.tables && exit $$status

bench-gpu: $(PACKAGE)
	PYTHON=$(abspath $(BIN))/python bash benchmarks/gpu_day.sh $(OUT)

peers: $(PACKAGE)
	$(BIN)/python -m benchmarks.peers_environment

config: $(PACKAGE)
	$(BIN)/python -m feedforward_recon.config.files

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEPS): requirements-dev.txt constraints-dev.txt | $(BIN)/python
	$(PIP) --requirement requirements-dev.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@

# --no-deps: the line above chose the headless OpenCV, setup.py would add the other one.
$(PACKAGE): setup.py setup.cfg pyproject.toml package.xml $(DEPS)
	$(PIP) --no-deps --editable .
	touch $@

# Each touches its target once nothing is left to do, and else says what it left out and why.
$(ROS_WHEELS): requirements-ros.txt constraints-ros.txt $(DEPS)
	$(BIN)/python test/ros_support/environment.py wheels $@

$(TF2_MSGS): test/ros_support/requirements-generator.txt $(TF2_SOURCES) $(ROS_WHEELS)
	$(BIN)/python test/ros_support/environment.py tf2_msgs $@
