#!/usr/bin/env bash
# Makes an environment in .venv-test with everything the tests compare with, and runs the checks and the whole suite.
#
#   scripts/test.sh [arguments of pytest]     with arguments, coverage is shown but not required
#
# PYTHON names the interpreter to use.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/environment.sh"
# torch first, with the libraries that its build for this machine needs.
make_environment "$root/.venv-test" "$root/scripts/requirements/test.txt" torch==2.13.0 || exit
cd "$root"
export PATH="$root/.venv-test/bin:$PATH"

failed=0
check() {
  echo "== $*" >&2
  "$@" || failed=1
}
check ruff format --check --quiet .
check ruff check --quiet .
check mypy
check lint-imports

required=90
[ $# -eq 0 ] || required=0
# Files stay whole on a worker, which shares compiled programs among their tests. One thread each for the peers.
export OMP_NUM_THREADS=1
check pytest --numprocesses 2 --dist loadfile --cov --cov-report term --cov-fail-under "$required" "$@"
exit "$failed"
