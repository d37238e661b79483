# Sourced by the other scripts: finds an interpreter and makes an environment from a lock file. Bash 3.2 and later.

# The first Python 3.11 to 3.13: $PYTHON if set, else the usual names. Of an active environment it is the interpreter
# beneath, since that environment may be the one that is made anew.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} $([ -n "${PYTHON:-}" ] || echo python3 python3.11 python3.12 python3.13 python); do
    "$candidate" -c '
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable))' 2>/dev/null && return
  done
  echo "${PYTHON:-python3}: not Python 3.11 to 3.13; install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
  return 2
}

# make_environment DIRECTORY LOCK [FIRST...]: installs FIRST with all that it needs, then exactly the lock file, then
# jaxlm itself from this checkout. A stamp written last says what the environment was made from; while that stays the
# same, nothing is done.
make_environment() {
  local directory=$1 lock=$2 root python stamp
  shift 2
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  python=$(find_python) || return
  stamp=$("$python" - "$root" "$lock" "$@" <<'PY'
import hashlib, pathlib, sys
root, lock, *first = sys.argv[1:]
parts = [pathlib.Path(lock).read_bytes(), pathlib.Path(root, "pyproject.toml").read_bytes()]
print(hashlib.sha256(b"\0".join([repr((sys.version, root, first)).encode(), *parts])).hexdigest())
PY
  )
  if [ "$(cat "$directory/made-for" 2>/dev/null)" = "$stamp" ] && [ -x "$directory/bin/jaxlm" ]; then
    return
  fi
  echo "installing into $directory with $("$python" --version) ..." >&2
  "$python" -m venv --clear "$directory" >&2 || {
    echo "$directory: cannot be made; check that Python has the venv module (Debian: apt install python3-venv)" >&2
    return 1
  }
  local install=("$directory/bin/python" -m pip install --disable-pip-version-check)
  [ -t 2 ] || install+=(--quiet)
  if [ $# -gt 0 ]; then "${install[@]}" --constraint "$lock" "$@" >&2; fi &&
    "${install[@]}" --no-deps --requirement "$lock" >&2 &&
    "${install[@]}" --no-deps --editable "$root" >&2 || {
    echo "$directory: the installation failed, see above; run the same command again" >&2
    return 1
  }
  echo "$stamp" >"$directory/made-for"
}
