"""One Trainer for all architectures and losses."""
