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
# jaxlm itself from this checkout. What it was made from is written into it last; while that stays the same, nothing is
# done, and where only the package's own description changed, only the package is installed again.
make_environment() {
  local directory=$1 lock=$2 root python made
  shift 2
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  python=$(find_python) || return
  local install=("$directory/bin/python" -m pip install --disable-pip-version-check)
  [ -t 2 ] || install+=(--quiet)

  made=$(_fingerprint "$python" "$lock" "$@")
  if [ "$(cat "$directory/made-from" 2>/dev/null)" != "$made" ]; then
    echo "installing into $directory with $("$python" --version) ..." >&2
    "$python" -m venv --clear "$directory" >&2 || {
      echo "$directory: cannot be made; check that Python has the venv module (Debian: apt install python3-venv)" >&2
      return 1
    }
    if [ $# -gt 0 ]; then "${install[@]}" --constraint "$lock" "$@" >&2; fi &&
      "${install[@]}" --no-deps --requirement "$lock" >&2 || _failed "$directory" || return
    echo "$made" >"$directory/made-from"
  fi
  made=$(_fingerprint "$python" "$root/pyproject.toml" "$root")
  if [ "$(cat "$directory/package-from" 2>/dev/null)" != "$made" ] || [ ! -x "$directory/bin/jaxlm" ]; then
    "${install[@]}" --no-deps --editable "$root" >&2 || _failed "$directory" || return
    echo "$made" >"$directory/package-from"
  fi
}

# _fingerprint PYTHON FILE [WORDS...]: a hash of the interpreter's version, the file's contents and the words.
_fingerprint() {
  local python=$1
  shift
  "$python" -c '
import hashlib, pathlib, sys
file, *words = sys.argv[1:]
print(hashlib.sha256(repr((sys.version, pathlib.Path(file).read_bytes(), words)).encode()).hexdigest())' "$@"
}

_failed() {
  echo "$1: the installation failed, see above; run the same command again" >&2
  return 1
}
