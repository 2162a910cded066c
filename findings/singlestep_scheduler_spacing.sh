#!/usr/bin/env bash
# diffusers 0.42.1: DPMSolverSinglestepScheduler keeps `timestep_spacing` in its config and does not obey it.
#
# Guess, before looking: from_config carries a model's spacing over, as it does between the other schedulers, or warns.
# Seen: of a DDIM config with trailing spacing DPM-Solver's multistep scheduler, UniPC and DEIS take the trailing
# timesteps. The singlestep scheduler reports "trailing" in its config, without a warning, and takes linearly spaced
# ones, which differ from the third step on. A student distilled on the trailing grid is then sampled beside its grid:
# give set_timesteps(timesteps=[...]).
#
# Output seen:
#   DPMSolverMultistepScheduler: trailing [999, 749, 499, 249]
#   UniPCMultistepScheduler: trailing [999, 749, 499, 249]
#   DEISMultistepScheduler: trailing [999, 749, 499, 249]
#   DPMSolverSinglestepScheduler: trailing [999, 749, 500, 250]
#   DPMSolverSinglestepScheduler with timesteps: [999, 749, 499, 249]
#
# Fails if that changes. Needs Linux and Python 3.11 to 3.13; 3.5 GB (torch) and five minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check diffusers==0.42.1 torch==2.15.0 'numpy==2.3.5' 'transformers==5.23.0' 2>/dev/null

venv/bin/python - 2>/dev/null <<'PYTHON' | tee output
import diffusers

NAMES = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
SINGLESTEP = "DPMSolverSinglestepScheduler"
model = diffusers.DDIMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
)
for name in (*NAMES, SINGLESTEP):
    scheduler = getattr(diffusers, name).from_config(model.config)
    scheduler.set_timesteps(4)
    print(f"{name}: {scheduler.config['timestep_spacing']} {scheduler.timesteps.tolist()}")
scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
print(f"{SINGLESTEP} with timesteps: {scheduler.timesteps.tolist()}")
PYTHON
grep -qx 'DPMSolverMultistepScheduler: trailing \[999, 749, 499, 249\]' output
grep -qx 'UniPCMultistepScheduler: trailing \[999, 749, 499, 249\]' output
grep -qx 'DEISMultistepScheduler: trailing \[999, 749, 499, 249\]' output
grep -qx 'DPMSolverSinglestepScheduler: trailing \[999, 749, 500, 250\]' output
grep -qx 'DPMSolverSinglestepScheduler with timesteps: \[999, 749, 499, 249\]' output
