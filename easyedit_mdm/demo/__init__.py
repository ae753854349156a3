"""The demo: a fact edited through EasyEdit, the denoising before and after, and the edit taken back."""

from easyedit_mdm.demo.demo import run_demo

__all__ = ["run_demo"]
