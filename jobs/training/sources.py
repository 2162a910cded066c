"""Names under which the models of a run are referred to in settings."""

from __future__ import annotations

TABLE_3 = "table-3"
"""The name of the architecture that SnapFusion Table 3 makes of a model's own."""


RECIPE_MODEL = "recipe:model"
"""The source of the recipe's own model."""


VPRED_MODEL = "run:vpred/model"
"""The source of the model that `jobs.finetune_vpred` makes of it."""


OWN_IMAGES_TABLE = "run:own"
"""The LATENTS of the user's own images, as `jobs.encode_latents --set source.table=own` makes them."""


EFFICIENT_MODEL = "run:efficient/model"
"""The source of the model that `jobs.train_efficient` makes of that."""


ROBUST_MODEL = "run:robust/model"
"""The source of the model that this job makes."""
