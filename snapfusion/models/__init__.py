"""Networks, and the bundle that holds a whole Stable Diffusion."""

from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
