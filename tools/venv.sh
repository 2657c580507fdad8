# Sourced by run.sh and test.sh: `make_venv NAME FILE…` makes .venv, installs the requirement files and sets $venv_python.
# A second call with the same files installs nothing: .venv/NAME.stamp remembers them.

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "No Python 3.10 to 3.13 with venv was found${PYTHON:+ at PYTHON=$PYTHON}." >&2
  echo "Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name it: PYTHON=/path/to/python3 bash $0" >&2
  return 1
}

venv_bin() {
  if [ -d .venv/Scripts ]; then echo .venv/Scripts/python; else echo .venv/bin/python; fi
}

make_venv() {
  local name=$1 file options=() python stamp
  shift
  if ! "$(venv_bin)" -c '' 2>/dev/null; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  venv_python=$(venv_bin)

  stamp="$(cat "$@" requirements.txt constraints.txt | cksum)"
  if [ "$stamp" != "$(cat ".venv/$name.stamp" 2>/dev/null)" ]; then
    echo "Installing $* into .venv (PyTorch is large: this can take minutes)"
    for file in "$@"; do options+=(-r "$file"); done
    [ -t 1 ] || options+=(--quiet)
    "$venv_python" -m pip install --disable-pip-version-check "${options[@]}" -c constraints.txt
    echo "$stamp" > ".venv/$name.stamp"
  fi
}
