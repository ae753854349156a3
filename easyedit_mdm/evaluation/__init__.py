"""The metrics: what a model writes after a prompt, held against what it should write."""

from easyedit_mdm.evaluation.fluency import fluency, ngram_entropy
from easyedit_mdm.evaluation.guard import CollapseGuard
from easyedit_mdm.evaluation.multi_step import score_prompts
from easyedit_mdm.evaluation.perplexity import perplexity

__all__ = ["CollapseGuard", "fluency", "ngram_entropy", "perplexity", "score_prompts"]
