# On a fresh machine each of these is the only command needed; .venv is made once and reused.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

demo: .venv/core  # train the small VLA and see that it learned (eight to ten minutes on two CPU cores)
	python -m machinery.supervise deepspeed --num_gpus 1 train_vla.py --config configs/demo.yaml --deepspeed_config ds_configs/cpu.json

rollout: .venv/examples  # let what "make demo" has trained act in the simulator: success rates, picture, film
	python examples/metaworld/rollout.py --checkpoint runs/demo+n1+b32+x7 --tasks demo --trials 10

break: .venv/core  # tell what "make demo" has trained something wrong, and see what notices (two minutes)
	python examples/break/break.py

course: .venv/course  # build and run the notebooks of course/ (half an hour on two busy CPU cores)
	python course/build.py

test: .venv/dev  # nearly everything, on the CPU
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadscope

slow: .venv/dev  # the tests that take longest
	OMP_NUM_THREADS=1 python -m pytest -q -m slow

check: .venv/dev
	ruff check .

.venv/core: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	pip install --upgrade pip
	DS_BUILD_OPS=0 pip install -r requirements.txt -c constraints.txt
	touch $@

.venv/dev: .venv/core requirements-dev.txt
	pip install -r requirements-dev.txt -c constraints.txt
	pip install --no-deps openpi-client==0.1.2
	touch $@

.venv/examples: .venv/core examples/metaworld/requirements.txt
	pip install -r examples/metaworld/requirements.txt -c constraints.txt
	touch $@

.venv/course: .venv/core course/requirements.txt
	pip install -r course/requirements.txt -c constraints.txt
	touch $@

.PHONY: course demo rollout break test slow check
