"""Settings that are places: relative paths mean nothing to processes that run in folders of their own."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from pistoseg import storage
from pistoseg.config import Config

WEIGHTS_FILE = re.compile(r"[/\\.]")
"""What a file's name has, and `imagenet` and `none` have not."""


def is_data(section: str, field: str, value: str) -> bool:
    """Whether a setting is a folder or file of data, on a disk or in object storage."""
    named = (section, field) in {("data", "uri"), ("data", "validation")}
    return named or (field == "weights" and bool(WEIGHTS_FILE.search(value)))


def data_places(config: Config) -> dict[str, str]:
    """The folders and files of data that a config names, also those of encoder weights, by `section.field`."""
    return {
        f"{section}.{field}": value
        for section, settings in config
        if isinstance(settings, BaseModel)
        for field, value in settings
        if isinstance(value, str) and is_data(section, field, value)
    }


def absolute(section: str, field: str, value: str) -> str:
    """A setting's value; where it is a relative path, the same place as an absolute one.

    Raises:
        PistoSegError: the URI of MLflow's database is none.
    """
    from pistoseg.tracking.server import database_file, database_uri

    if (section, field) == ("tracking", "uri") and (database := database_file(value)):
        return value if database.is_absolute() else database_uri(database.absolute())
    return storage.absolute(value) if is_data(section, field, value) and storage.is_local(value) else value


def with_absolute(config: Config) -> Config:
    """A config whose places are the same from whatever folder they are looked at."""
    changed: dict[str, Any] = {}
    for section, settings in config:
        if isinstance(settings, BaseModel):
            texts = ((field, value) for field, value in settings if isinstance(value, str))
            places = {field: absolute(section, field, value) for field, value in texts}
            changed[section] = settings.model_copy(update=places)
    return config.model_copy(update=changed)
