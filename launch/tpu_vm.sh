#!/usr/bin/env bash
# Starts a worker on one host of a TPU slice; ends as the worker does, or with 75 if it could not be started.
#
#   tpu_vm.sh PYTHON_VERSION LOG python ARGUMENTS...      in the folder of the code
#
# A worker outlives a lost connection. The next one asks it to save and to leave before it starts itself, since a TPU
# serves one process; one that does not leave within SLM_GRACE seconds (120) is killed. The output goes to LOG too, and
# goes on going there when nobody listens any more.
set -uo pipefail
version=$1 log=$2
shift 3
home=$HOME/.slm_jax
mkdir -p "$home" "$(dirname "$log")" || exit 75

exec 9>>"$home/lock" # held by the worker as long as it lives
if ! flock --nonblock 9; then
  kill -TERM "$(cat "$home/pid")"
  flock --timeout "${SLM_GRACE:-120}" 9 || { kill -KILL "$(cat "$home/pid")"; flock --timeout 10 9 || exit 75; }
fi

venv=$home/venv-$version
if ! cmp --silent requirements.lock "$venv/requirements.lock"; then
  {
    python3 -m pip install --quiet --user uv &&
      python3 -m uv venv --quiet --clear --python "$version" "$venv" &&
      python3 -m uv pip install --quiet --python "$venv/bin/python" -r requirements.lock 'jax[tpu]' &&
      cp requirements.lock "$venv/requirements.lock"
  } || exit 75
fi

{
  echo "$BASHPID" >"$home/pid"
  PYTHONUNBUFFERED=1 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} exec "$venv/bin/python" "$@"
} 2>&1 | tee --output-error=warn-nopipe --append "$log" 9>&-
exit "${PIPESTATUS[0]}"
