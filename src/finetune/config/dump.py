"""A configuration as text: YAML that loads as it is, and the JSON schema that editors check it with."""

import io
from typing import Any

from finetune.config.checks import idle_keys
from finetune.config.schema import RunConfig

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def dump_config(config: RunConfig) -> str:
    """YAML with every value that matters, defaults included: a later change of a default cannot change the run.

    Options without effect (lora.* of full fine-tuning) are left out, as loading refuses them. Paths stay as they
    were given, relative to the directory that the run was started in.
    """
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 4096
    idle = idle_keys(config)
    tree = {
        section: {name: value for name, value in values.items() if f"{section}.{name}" not in idle}
        for section, values in config.model_dump(mode="json").items()
    }
    text = io.StringIO()
    yaml.dump({section: values for section, values in tree.items() if values}, text)
    return text.getvalue()


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, with the help texts; from the pydantic models."""
    schema = RunConfig.model_json_schema()
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "finetune configuration"}
