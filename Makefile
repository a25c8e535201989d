# Short names for what run.sh does; it installs what is missing into .venv first.
.PHONY: check test test-fast format quickstart

check:
	./run.sh check

test:
	./run.sh test

test-fast:
	./run.sh test -m "not slow"

format:
	./run.sh format

quickstart:
	./run.sh
