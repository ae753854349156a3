"""Training: `easyedit-mdm adapt`, which makes a masked model out of an autoregressive one."""
