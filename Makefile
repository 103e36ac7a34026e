EXTENSION = pgqueue
EXTVERSION = 0.1.0

DATA_built = $(EXTENSION)--$(EXTVERSION).sql
DATA = $(wildcard sql/$(EXTENSION)--*--*.sql)

REGRESS = smoke
REGRESS_OUTPUT = tests/pg_regress/output
REGRESS_OPTS = --inputdir=tests/pg_regress --outputdir=$(REGRESS_OUTPUT)
EXTRA_CLEAN = $(REGRESS_OUTPUT) $(DATA_built).tmp

# Here, as PGXS may be absent: the first target of the file is the default one.
all:

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs 2>/dev/null)

ifneq ($(wildcard $(PGXS)),)
include $(PGXS)
# PostgreSQL before 18 ignores prefix, and 18 puts its files elsewhere unless it contains "postgres".
ifeq ($(origin prefix),command line)
override datadir := $(prefix)/share
endif
else
all: $(DATA_built)

clean:
	rm -rf $(DATA_built) $(EXTRA_CLEAN)

install uninstall installcheck:
	@echo 'make $@ needs the build files of the PostgreSQL server, which "$(PG_CONFIG)" did not name.' >&2
	@echo 'Install them (Debian: postgresql-server-dev-NN) or say which: make $@ PG_CONFIG=/path/to/pg_config' >&2
	@exit 1

.PHONY: all clean install uninstall installcheck
endif

$(DATA_built): $(sort $(wildcard sql/[0-9]*.sql))
	cat $^ > $@.tmp
	mv $@.tmp $@

# Development, without any need for PGXS.

PYTHON ?= python3
VENV_PYTHON = .venv/bin/python

.PHONY: venv test chaos demo bench bench-quick lint sync

venv: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo '$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv).' >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --editable '.[test,dev]'
	touch $@

test: venv
	$(VENV_PYTHON) -m pytest --numprocesses auto $(PYTEST_ARGS)

# The model-based test with many seeds, and with threads: minutes, as told in CHAOS_ARGS.
chaos: venv
	$(VENV_PYTHON) -m tests.chaos $(CHAOS_ARGS)

demo: venv
	$(VENV_PYTHON) -m pgqueue_sql demo $(if $(DSN),--dsn '$(DSN)')

# Hours, as it holds a snapshot for 10 minutes at a time. In parts, for example:
# make bench BENCH_ARGS='--only publish,receive --server 18'
bench: .venv/installed-bench
	$(VENV_PYTHON) -m tests.bench $(BENCH_ARGS)

bench-quick: .venv/installed-bench
	$(VENV_PYTHON) -m tests.bench --quick $(BENCH_ARGS)

.venv/installed-bench: .venv/installed
	$(VENV_PYTHON) -m pip install --editable '.[bench]'
	touch $@

lint: venv
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy --strict pgqueue_sql tests

# pgqueue_sql/_sync is generated from pgqueue_sql/_async.
sync: venv
	$(VENV_PYTHON) tests/make_sync.py
