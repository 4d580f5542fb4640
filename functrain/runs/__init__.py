"""Where training meets the disk: run directories, checkpoints, configs and what is shown of them."""
