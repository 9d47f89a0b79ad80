"""Alpha as PEFT keeps it: not beside the factors but in its configuration, for all layers or by the ends of names.

diffusers writes that configuration into the header's metadata (``lora_adapter_metadata``, keys such as
``unet.lora_alpha``), PEFT itself into ``adapter_config.json`` beside the file. The scale is ``alpha / r``, with
``use_rslora`` it is ``alpha / sqrt(r)`` (Kalajdzievski 2023); without any configuration it is 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sumuk.base.errors import BadFile
from sumuk.files.shards import read_json
from sumuk.weights.source import Source

METADATA = "lora_adapter_metadata"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Scales:
    """What a file's configuration says.

    Attributes:
        where: the file, for messages.
        configs: prefix of a network's names, empty for all -> fields of its ``LoraConfig``.
    """

    where: str
    configs: Mapping[str, Mapping[str, Any]]

    def alpha(self, layer: str, rank: int) -> float | None:
        """Of a layer, as kohya's files would store it; None where nothing is said.

        Raises:
            BadFile: it is no finite number, or given by patterns other than the ends of names.
        """
        for prefix, config in self.configs.items():
            if prefix and not layer.startswith(f"{prefix}."):
                continue
            path = layer.removeprefix(f"{prefix}." if prefix else "base_model.model.")
            value = self._value(config, path)
            if value is None:
                continue
            return value * math.sqrt(rank) if config.get("use_rslora") is True else value
        return None

    def _value(self, config: Mapping[str, Any], path: str) -> float | None:
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise self._bad("alpha_pattern", patterns)
        value = config.get("lora_alpha", config.get("alpha"))
        for pattern, said in patterns.items():
            plain = pattern.removeprefix("^").removesuffix("$")
            if not plain.replace("_", "").replace(".", "").isalnum():
                raise self._bad("a pattern of alpha_pattern", pattern)
            if path == plain or (not pattern.startswith("^") and path.endswith(f".{plain}")):
                value = said
                break
        if value is None:
            return None
        if not isinstance(value, int | float) or not abs(value) < 1e300:  # of an int as well, however large
            raise self._bad("alpha", value)
        return float(value)

    def _bad(self, what: str, value: object) -> BadFile:
        return BadFile(f"{self.where}: {what} of its configuration is {value!r:.60}", "lora.config")


def scales(source: Source) -> Scales:
    """The configuration that came with a file, if any.

    Raises:
        BadFile: it is there and cannot be read.
    """
    where = str(source.path)
    if (text := source.metadata.get(METADATA)) is not None:
        try:
            flat = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadFile(f"{where}: metadata {METADATA} is no JSON: {error}", "lora.config") from error
        if not isinstance(flat, dict):
            raise BadFile(f"{where}: metadata {METADATA} is no JSON object", "lora.config")
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            prefix, _, name = key.rpartition(".")
            configs.setdefault(prefix, {})[name] = value
        return Scales(where, configs)
    place = source.files[0].with_name(CONFIG)
    beside = source.path.is_dir() or source.path.name.startswith("adapter_model.")
    return Scales(where, {"": read_json(place)} if beside and place.exists() else {})
