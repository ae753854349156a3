"""States of a target, and the sampler that walks through them."""

from easyedit_mdm.denoising.likelihood import log_likelihood
from easyedit_mdm.denoising.sampler import ORDERS, DecodeConfig, Trajectory, decode, generate
from easyedit_mdm.denoising.states import SCHEDULES, States, schedule

__all__ = [
    "ORDERS",
    "SCHEDULES",
    "DecodeConfig",
    "States",
    "Trajectory",
    "decode",
    "generate",
    "log_likelihood",
    "schedule",
]
