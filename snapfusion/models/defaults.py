"""Number of steps and guidance with which a model is sampled if none are given."""

from snapfusion.models.bundle import Bundle
from snapfusion.models.tokenizer import CLIP_VOCABULARY

_STEPS = 50
_GUIDANCE, _MINIATURE_GUIDANCE = 7.5, 2.5


def distilled_steps(bundle: Bundle) -> int:
    """Steps that a model was distilled for; 50 for one that was not."""
    return int(bundle.distillation["steps"]) if bundle.distillation else _STEPS


def default_guidance(bundle: Bundle) -> float:
    """Guidance w for a model: 2.5 for a miniature, else 7.5, within what a student was distilled for."""
    miniature = bundle.tokenizer.vocab_size != CLIP_VOCABULARY
    w = _MINIATURE_GUIDANCE if miniature else _GUIDANCE
    cfg_range = (bundle.distillation or {}).get("cfg_range")
    return min(max(w, cfg_range["low"]), cfg_range["high"]) if cfg_range else w
