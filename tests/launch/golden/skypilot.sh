mkdir -p /mnt/slm/tiny/skypilot
cat > /mnt/slm/tiny/skypilot/tiny-0123456789ab.yaml <<'TASK'
name: "tiny-0123456789ab-0a1089"
resources:
  accelerators: "A100:8"
  use_spot: true
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes:
    - 42
    - 137
    - 143
workdir: "."
file_mounts:
  "/mnt/slm":
    source: "gs://slm-results"
    mode: MOUNT
setup: "python3 -m pip install --quiet uv && python3 -m uv venv --clear --python 3.12 .venv && python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.lock 'jax[cuda13]'"
run: "exec .venv/bin/python tiny '--config.name=a b; rm -rf $HOME' --workdir=/mnt/slm/tiny --arm=0123456789ab"
TASK
sky jobs launch --yes --detach-run /mnt/slm/tiny/skypilot/tiny-0123456789ab.yaml
# once done: tiny-0123456789ab
cat > /mnt/slm/tiny/skypilot/tiny-ba9876543210.yaml <<'TASK'
name: "tiny-ba9876543210-0a1089"
resources:
  accelerators: "A100:8"
  use_spot: true
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes:
    - 42
    - 137
    - 143
workdir: "."
file_mounts:
  "/mnt/slm":
    source: "gs://slm-results"
    mode: MOUNT
setup: "python3 -m pip install --quiet uv && python3 -m uv venv --clear --python 3.12 .venv && python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.lock 'jax[cuda13]'"
run: "exec .venv/bin/python tiny '--config.name=a b; rm -rf $HOME' --workdir=/mnt/slm/tiny --arm=ba9876543210"
TASK
sky jobs launch --yes --detach-run /mnt/slm/tiny/skypilot/tiny-ba9876543210.yaml
