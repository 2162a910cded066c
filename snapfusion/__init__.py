"""The method: schedules, sampling, losses, models, training and export. Imports neither Ray nor pyarrow."""

import logging
import os

# diffusers imports torchao where it is installed (executorch brings it); both then speak of matters of their
# own on every worker's start. Whoever wants to hear them sets the variables.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
