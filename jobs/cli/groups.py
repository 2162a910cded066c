"""Names every verb, by group and with one line of help, and what usually follows it."""

GROUPS = {
    "Data": {
        "download-shards": "download the images of URL lists into shards",
        "render-scenes": "render the miniature's scenes into shards",
        "find-duplicates": "find rows that copy others, or an evaluation's",
        "encode-latents": "images of shards -> LATENTS, by the VAE",
        "generate-pairs": "captions -> PAIRS, by the teacher in 50 steps",
        "compute-targets": "LATENTS -> TARGETS, by the teacher (Sec. 4.2)",
        "top-up": "append to a table within a quota, for schedules",
        "verify-table": "check a table's files, and recompute samples",
        "compact": "the same table anew, in fewer and larger files",
        "export-table": "a table as WebDataset shards for other trainers",
    },
    "Training": {
        "run-pipeline": "everything from shards to report, in order",
        "finetune-vpred": "a model of eps into one of v (Eq. 6)",
        "train-robust": "with stochastic block skipping (Eq. 5)",
        "evolve-unet": "search the architecture for a latency (Alg. 1)",
        "train-efficient": "another architecture: Table 3's or an evolved one",
        "distill-steps": "a student of fewer steps (Eq. 7-11)",
        "distill-schedule": "students one after the other (Sec. 4.1)",
        "distill-decoder": "the half-width decoder (Sec. 3.2)",
        "train-mini": "the bundled miniature, from its seed",
    },
    "Evaluation": {
        "generate": "images of a caption, by a model or a phone bundle",
        "report": "the run's page, and metrics.json",
        "evaluate": "FID and CLIP over guidance scales (Fig. 4)",
        "ablate": "the ablations of Fig. 6 and 7",
        "compare-chance": "the evolved architecture beside random ones",
        "measure-latency": "latency of each part of the UNet (Fig. 2)",
        "measure-efficiency": "the efficient networks beside the originals",
        "measure-mini": "the miniature on held-out scenes",
        "measure-robustness": "what models lose without blocks (Fig. 5)",
    },
    "Phones": {
        "compile-mobile": "a bundle of ExecuTorch and Core ML programs",
        "verify-bundle": "a bundle's files, sampler, tokenizer, programs",
        "benchmark": "time a bundle's modules beside torch",
        "serve": "a page: models side by side, or a bundle's own",
    },
    "Publication": {
        "export": "one file with LDM keys, or Apple's layout",
        "publish": "a model and its card in a repository on a hub",
    },
    "Operations": {
        "check": "what a model is, what is read of it, what it costs",
        "recipes": "list the recipes, or print one as YAML",
        "plan": "rows, hours, cost and memory of a run, beforehand",
        "forget": "delete rows and what derives from them",
        "vacuum": "list or delete files that nobody reads any more",
    },
}
"""Verbs as --help groups them, with one line each."""

FOLLOWING = {
    "render_scenes": "encode-latents",
    "download_shards": "encode-latents",
    "find_duplicates": "encode-latents",
    "encode_latents": "generate-pairs",
    "generate_pairs": "distill-decoder",
    "compute_targets": "distill-steps",
    "finetune_vpred": "train-efficient",
    "train_robust": "evolve-unet",
    "evolve_unet": "train-efficient",
    "measure_latency": "evolve-unet",
    "train_efficient": "distill-steps",
    "distill_steps": "compile-mobile",
    "distill_schedule": "evaluate",
    "distill_decoder": "compile-mobile",
    "compile_mobile": "report",
    "evaluate": "report",
}
"""The next sensible job of the same run."""
