"""Names of what a UNet predicts, eps or v; importable without torch."""

from typing import Literal, get_args

PredictionType = Literal["epsilon", "v_prediction"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
