"""An Axolotl plugin for tests: with several ranks Axolotl maps each rank's model to a GPU, which is not here."""

from axolotl.integrations.base import BasePlugin


class KeepOnCPU(BasePlugin):
    """Loads the model on the CPU of each rank."""

    def load_datasets(self, cfg, preprocess=False):
        """Called before the model is loaded; loads no dataset."""
        cfg.device_map = {"": "cpu"}
