"""`DeRTaPlugin`: where Axolotl asks its plugins, and what DeRTa answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import axolotl
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.loaders.utils import load_model_config

from derta_plugins.adapters.axolotl_args import check_settings, derta_config, fused_loss
from derta_plugins.adapters.axolotl_cache import mark_entries
from derta_plugins.adapters.axolotl_names import DATASET_TYPE, PLUGIN, SPLITS, our_entries
from derta_plugins.adapters.axolotl_rows import TripleStrategy
from derta_plugins.adapters.axolotl_trainer import AxolotlDeRTaTrainer
from derta_plugins.adapters.branch_batch import layout_for
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.refusal_token import RefusalToken


class DeRTaPlugin(BasePlugin):
    """
    Turns on DeRTa in an Axolotl run: `plugins: [derta_plugins.adapters.axolotl.DeRTaPlugin]`.

    Attributes:
        config: Knobs of the run; set when Axolotl registers the config.
        target: RTO target, once a dataset of safety records was read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config: DeRTaConfig = DeRTaConfig()
        self.target: RefusalToken | None = None
        self._split_of_mark: dict[str, str] = {}

    def is_on(self, cfg: Mapping[str, Any]) -> bool:
        """Whether `cfg` names this plugin: Axolotl also calls those that earlier configs of the process named."""
        loaded = PluginManager.get_instance().plugins
        return any(loaded.get(name) is self for name in cfg.get("plugins") or [])

    def register(self, cfg: Any) -> None:
        """Read the knobs, and write what rows depend on into the dataset entries, so that Axolotl's cache knows it."""
        if not self.is_on(cfg):
            return
        self.config, self.target = derta_config(cfg), None
        check_settings(cfg, self.config)
        if self.config.layout == "branch":
            self.config = layout_for(self.config, load_model_config(cfg))
        mark_entries(cfg, self.config)
        self._split_of_mark = {entry["conversation"]: name for name in SPLITS for entry in our_entries(cfg, name)}

    def get_input_args(self) -> str:
        return PLUGIN.replace("DeRTaPlugin", "DeRTaArgs")

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        if self.is_on(cfg) and not our_entries(cfg, "datasets"):
            raise ConfigError(
                f"DeRTa is on, but no entry of `datasets` has `type: {DATASET_TYPE}`. Give your safety records one."
            )

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        # Axolotl switches it off; targets are counted over all ranks
        return {"average_tokens_across_devices": True} if self.is_on(cfg) else None

    def get_trainer_cls(self, cfg: Any) -> type[AxolotlDeRTaTrainer] | None:
        if not self.is_on(cfg):
            return None
        check_settings(cfg, self.config)
        for name in SPLITS:
            for entry in our_entries(cfg, name):
                self.split_of(entry)
        for name, other in PluginManager.get_instance().plugins.items():
            if not isinstance(other, DeRTaPlugin) and other.get_trainer_cls(cfg) is not None:
                raise ConfigError(
                    f"The plugin {name} brings a trainer of its own, whose loss is not DeRTa's. Remove it."
                )
        return AxolotlDeRTaTrainer.for_run(
            self.config,
            is_loss_fused=fused_loss(cfg) is not None,
            evaluates_triples=bool(our_entries(cfg, "test_datasets")),
        )

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if self.is_on(cfg) and not isinstance(trainer, AxolotlDeRTaTrainer):
            raise ConfigError(
                f"Axolotl made a {type(trainer).__name__}, not DeRTa's trainer: another plugin or setting replaced it. "
                "Remove that."
            )

    def split_of(self, entry: Mapping[str, Any]) -> str:
        """
        Which of `SPLITS` a validated entry is of.

        Raises:
            RuntimeError: If the entry lost what `register` wrote into it.
        """
        if entry.get("conversation") not in self._split_of_mark:
            raise RuntimeError(
                f"The dataset entry {entry.get('path')!r} lost DeRTa's mark (field `conversation`), without which rows "
                f"of other knobs could be trained from Axolotl's cache: Axolotl {axolotl.__version__} is not supported."
            )
        return self._split_of_mark[entry["conversation"]]

    def agree_on(self, target: RefusalToken | None, name: str) -> None:
        """
        Keep the RTO target of one dataset.

        Raises:
            ConfigError: If an earlier dataset had another.
        """
        if self.target is not None and target is not None and target.id != self.target.id:
            raise ConfigError(
                f"The RTO target of {name} is {target.text!r} (id {target.id}), that of another dataset "
                f"{self.target.text!r} (id {self.target.id}). Set `derta.refusal_text`, so that there is one."
            )
        self.target = target or self.target


def load(tokenizer: Any, cfg: Any, ds_cfg: Mapping[str, Any] | None = None) -> TripleStrategy:
    """
    Prompt strategy of `type: derta_plugins.adapters.axolotl`; Axolotl calls it.

    Raises:
        ConfigError: If the plugin is not on: its trainer must train these rows.
    """
    loaded = PluginManager.get_instance().plugins.values()
    plugin = next((one for one in loaded if isinstance(one, DeRTaPlugin) and one.is_on(cfg)), None)
    if plugin is None:
        raise ConfigError(
            f"`type: {DATASET_TYPE}` needs the plugin that trains it. Add `{PLUGIN}` to `plugins`, got "
            f"{list(cfg.get('plugins') or [])}."
        )
    return TripleStrategy(plugin, tokenizer, cfg, dict(ds_cfg or {}))
