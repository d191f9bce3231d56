"""What every host on Lightning leaves in ``OUTPUT_DIR``."""

FILES = {
    "config.yaml",
    "csv",
    "inference",
    "last.ckpt",
    "log.txt",
    "metrics.json",
    "model_final.pth",
    "results.json",
    "run.json",
    "tensorboard",
}
