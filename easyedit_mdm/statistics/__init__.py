"""Second moments of keys: collected, stored, solved with."""

from easyedit_mdm.statistics.moments import SecondMoments, collect, moments_for

__all__ = ["SecondMoments", "collect", "moments_for"]
