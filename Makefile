# make demo trains DGL on scikit-learn's digits and draws its learning curves; make test runs the tests. Both create .venv
# on their first run.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/python learning_curves/cifar_dgl.py --dataset digits --channels 8 --lr 0.05 --epochs 20 --precise-statistics --name demo --log-dir demo
	.venv/bin/python -m decoupled plot demo --output demo/learning_curves.png
	@echo
	@echo "Four modules have learned at the same time, each from its own loss: see demo/learning_curves.png. Next, try"
	@echo "    .venv/bin/python -m decoupled predict demo             # early exit: accuracy and FLOPs at each head"
	@echo "    .venv/bin/python learning_curves/cifar_dgl.py --half   # the paper's run on CIFAR-10; without --half on older CPUs"

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n 2

# make gpu is for a machine with a GPU: tests, benchmarks (module_parallel.py measures the CPU; imagenet_input.py is left
# out because it needs ImageNet), then runs for the paper's tables. Each piece ends within nine minutes and writes a file
# to gpu/. The same command continues with the missing files, and with the runs. LIMIT ends a piece like Ctrl-C does.
# RUNS: see results/reproduce.py list.
RUNS ?= learning_curves-parallel learning_curves-sequential
DATA ?= data
LIMIT = timeout --signal=INT --kill-after=20 510
PIECES = tests_runs tests_exact tests_rest tests_processes throughput_fp32 throughput_half resnet152_fp32 resnet152_half vgg19_fp32 vgg19_half step_costs_fp32 step_costs_half module_parallel_fp32 module_parallel_half module_parallel_paper

gpu: $(PIECES:%=gpu/%.txt)
	.venv/bin/python results/reproduce.py run $(RUNS) --half --budget 8 --data-dir $(DATA) --log-dir gpu/runs

gpu/%.txt: .venv/installed
	@.venv/bin/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu needs a CUDA GPU")'
	mkdir -p gpu
	$(LIMIT) .venv/bin/python $(COMMAND) > $@.part 2>&1 || { tail -20 $@.part; exit 1; }
	mv $@.part $@

gpu/tests_runs.txt: COMMAND = -m pytest -rs tests/test_cuda.py -k "resumes and not deterministic or overflow"
gpu/tests_exact.txt: COMMAND = -m pytest -rs tests/test_cuda.py -k "deterministic or waits"
gpu/tests_rest.txt: COMMAND = -m pytest -rs tests/test_cuda.py -k "fp16 or compiled or allocators or buffer_in"
gpu/tests_processes.txt: COMMAND = -m pytest -rs tests/test_imagenet.py -k gpus
gpu/throughput_fp32.txt: COMMAND = benchmarks/throughput.py --device cuda
gpu/throughput_half.txt: COMMAND = benchmarks/throughput.py --device cuda --half
gpu/resnet152_fp32.txt: COMMAND = benchmarks/step_costs.py --device cuda --network resnet152 --splits 2 4 --methods checkpointing DGL --budget 16
gpu/resnet152_half.txt: COMMAND = benchmarks/step_costs.py --device cuda --network resnet152 --splits 2 4 --methods checkpointing DGL --budget 16 --half
gpu/vgg19_fp32.txt: COMMAND = benchmarks/step_costs.py --device cuda --network vgg19 --splits 2 4 --methods checkpointing DGL --budget 16
gpu/vgg19_half.txt: COMMAND = benchmarks/step_costs.py --device cuda --network vgg19 --splits 2 4 --methods checkpointing DGL --budget 16 --half
gpu/step_costs_fp32.txt: COMMAND = benchmarks/step_costs.py --device cuda --splits 2 4
gpu/step_costs_half.txt: COMMAND = benchmarks/step_costs.py --device cuda --splits 2 4 --half
gpu/module_parallel_fp32.txt: COMMAND = benchmarks/module_parallel.py
gpu/module_parallel_half.txt: COMMAND = benchmarks/module_parallel.py --half
gpu/module_parallel_paper.txt: COMMAND = benchmarks/module_parallel_paper.py

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv demo

.PHONY: demo test gpu clean
