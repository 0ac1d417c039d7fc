# make demo     the embedded example: collection, teacher, students, measures; offline, on the CPU
# make test     every test that this machine can run, e.g. make test PYTEST_ARGS='-m "not slow" tests/test_losses.py'
# make quality  lint, format check, and the types of the public names
# make clean    remove what the others made
# Each installs the tested set (constraints.txt) into .venv first. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
PYTEST_ARGS ?=
INSTALLED := .venv/.installed

.PHONY: demo test quality clean

# A recipe line without shell syntax is run by make itself, so that Ctrl-C reaches the program and no shell in between.
demo: $(INSTALLED)
	.venv/bin/python -m hf_kd_ranking demo

# Two workers with one thread each: a fifth faster than one worker with two threads on two cores, while two workers with
# two threads each are ten times slower.
test: export HF_HUB_OFFLINE := 1
test: export TOKENIZERS_PARALLELISM := false
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED)
	.venv/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

quality: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# An installation that was interrupted has no marker, and begins anew: pip cannot repair a half-installed environment.
$(INSTALLED): setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(if $(wildcard $@),,--clear) .venv
	rm -f $@
	.venv/bin/python -m pip install -e ".[demo,test,dev]" -c constraints.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
