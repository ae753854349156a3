"""Second moments of keys: collected, stored, solved with."""

from easyedit_mdm.statistics.collecting import CollectConfig, collect
from easyedit_mdm.statistics.moments import SecondMoments
from easyedit_mdm.statistics.store import cache_folder, key_width, moments_for, note_base, read
from easyedit_mdm.statistics.texts import TextSource, text_source

__all__ = [
    "CollectConfig",
    "SecondMoments",
    "TextSource",
    "cache_folder",
    "collect",
    "key_width",
    "moments_for",
    "note_base",
    "read",
    "text_source",
]
