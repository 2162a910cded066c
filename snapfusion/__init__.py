"""The method: schedules, sampling, losses, models, training and export. Imports neither Ray nor pyarrow."""

import logging
import os

# executorch installs torchao, and diffusers imports torchao where it finds it: both then log about features
# that are not used here, once per worker. Set the variables to see those messages.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
