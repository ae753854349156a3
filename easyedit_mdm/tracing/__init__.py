"""Causal tracing: which states carry a fact, in masked and autoregressive models alike."""

from easyedit_mdm.tracing.corruption import CORRUPTIONS, Corruption
from easyedit_mdm.tracing.effects import MEASURES, FactTrace, StateTrace, TraceConfig, trace_fact, trace_facts
from easyedit_mdm.tracing.facts import CLASSES, Checked, TracedFact, check_known, own_answer, read_facts
from easyedit_mdm.tracing.restoring import KINDS, Runs

__all__ = [
    "CLASSES", "CORRUPTIONS", "KINDS", "MEASURES", "Checked", "Corruption", "FactTrace", "Runs", "StateTrace",
    "TraceConfig", "TracedFact",
    "check_known", "own_answer", "read_facts", "trace_fact", "trace_facts",
]  # fmt: skip
