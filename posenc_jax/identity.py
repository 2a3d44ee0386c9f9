"""Settings that do not identify a run, because they may change or did not exist before."""

# Fields that may change when a run is continued, as may those that are `RunConfig.located`.
RESUMABLE = (
    "training.duration",
    "training.log_every",
    "training.validate_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.allow_schedule_change",
    "training.steps_per_dispatch",
    "training.profile",
    "data.cache_dir",
    "sharding.fsdp",
    "sharding.tensor",
    "sharding.parallel_runs",
    "logging.wandb",
    "logging.sample_prompt",
    "logging.sample_tokens",
)
# Settings that the records of earlier runs may lack, and the values that those runs had. The fingerprint leaves these
# values out, so that it is the same as before.
ADDED = {
    "data.field": "text",
    "data.tokenizer_sha256": "",
    "data.packing": "none",
    "encoding.bidirectional": False,
    "encoding.key_offset": False,
    "model.attention_sinks": False,
    "model.attention_gate": False,
    "model.canon": False,
    "optimizer.name": "adamw",
    "optimizer.schedule": "cosine",
    "training.decay": "0 steps",
    "logging.wandb": "",
    "logging.sample_prompt": "",
    "logging.sample_tokens": 64,
}
