# make demo trains DGL on the embedded digits and draws its learning curves; make test runs the tests. Both set up .venv first, once.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/python learning_curves/cifar_dgl.py --dataset digits --epochs 12 --name demo --log-dir demo
	.venv/bin/python -m decoupled.plots demo --output demo/learning_curves.png

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv demo

.PHONY: demo test clean
