"""Axolotl plugins for tests: ranks that stay on the CPU, and a run that dies in the middle."""

import os
import signal

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback


class KeepOnCPU(BasePlugin):
    """Loads the model on the CPU of each rank: with several, Axolotl maps each rank's to a GPU, which is not here."""

    def load_datasets(self, cfg, preprocess=False):
        """Called before the model is loaded; loads no dataset."""
        cfg.device_map = {"": "cpu"}


class DieAtStep(BasePlugin):
    """Kills the process without a word after the step that `DIE_AT_STEP` names."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        """The callback that does it."""
        return [_Die(int(os.environ["DIE_AT_STEP"]))]


class _Die(TrainerCallback):
    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)
