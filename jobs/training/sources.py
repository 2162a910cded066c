"""Names by which settings refer to models and tables of a run."""

RUN_PREFIX = "run:"
"""Begins the path of something in the run."""

RECIPE_MODEL = "recipe:model"
"""The recipe's own model."""

VPRED_MODEL = "run:vpred/model"
"""The v model that `jobs.finetune_vpred` makes of it."""

ROBUST_MODEL = "run:robust/model"
"""The robust model of `jobs.train_robust`."""

EFFICIENT_MODEL = "run:efficient/model"
"""The efficient model of `jobs.train_efficient`."""

OWN_IMAGES_TABLE = "run:own"
"""LATENTS of the user's own images: `jobs.encode_latents --set source.table=own`."""

TABLE_3 = "table-3"
"""The architecture that SnapFusion Table 3 makes of a model's own."""
