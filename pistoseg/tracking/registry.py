"""The registered models: found by name, shown with their lineage, promoted, exported as a folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pistoseg import storage
from pistoseg.artifacts import MANIFEST, Artifact, Workspace
from pistoseg.config import TrackingConfig
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.progress import Progress
from pistoseg.redaction import first_line
from pistoseg.tracking.delivery import found_by, is_refusal, quoted
from pistoseg.tracking.server import connect, database_file, default_server, tracking_uri

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

BUNDLE = "pistoseg.bundle"
FINGERPRINT = "pistoseg.fingerprint"
SEARCH = "pistoseg.search"
DEFAULT_WORKSPACE = "runs/pistoseg"
CHAMPION = "champion"
PREVIOUS = "previous"
SCORES = {"miou": "mIoU", "label_iou": "IoU by labels"}
"""By which models are compared, the first that both have, and what it is called."""
FILES = ("model.json", "model.safetensors")
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
"""MLflow's words for a model, version or alias that it does not have."""
_NAMED = re.compile(r"[^/@:]+(@[^/@:]+|/\d+)")
"""NAME@ALIAS or NAME/VERSION."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model.

    Args:
        name: of the model.
        version: its number.
        aliases: names that point to it.
        tags: of the version.
        run_id: MLflow run that logged it.
        created: milliseconds since 1970.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    run_id: str | None
    created: int

    @property
    def bundle(self) -> str:
        """URI of its bundle; `PistoSegError` where PistoSeg did not register it."""
        if BUNDLE not in self.tags:
            raise PistoSegError(
                f"has no tag {BUNDLE}",
                file=f"models:/{self.name}/{self.version}",
                remedy="give its bundle's URI, or register with `pistoseg train`",
            )
        return self.tags[BUNDLE]


def bundle_uri(model: str, config: TrackingConfig, workspace: Workspace) -> str:
    """The URI of a model's bundle: as it is, that of a workspace, or what the registry says of a name.

    Args:
        model: URI of a bundle or of a workspace with one, `models:/name@alias` or `models:/name/3`.
        config: of the server.
        workspace: where the database is unless the config names a server.
    Raises:
        PistoSegError: there is no such model, it was not registered by PistoSeg, its bundle was deleted, or a workspace
            has several of which neither one is the champion nor the newest, or one of a search, alone registered.
    """
    if not model.startswith("models:/"):
        return _bundle_at(model, config)
    registry = Registry(config, workspace)
    version = registry.find(model)
    if not storage.exists(storage.join(version.bundle, FILES[0])):
        place = f"--workspace {shlex.quote(workspace.root)} " if database_file(registry.uri) else ""
        raise PistoSegError(
            f"its bundle {version.bundle} is not there",
            file=model,
            remedy=f"write MLflow's copy to a folder with `pistoseg models export {version.name}/{version.version} "
            f"{place}--out FOLDER`, and give that folder",
        )
    return version.bundle


def workspace_of(model: str) -> str:
    """The workspace on a disk that a model names, if it can be written to; else the default one.

    That of a model in object storage has its MLflow where its training ran.
    """
    place = None if model.startswith("models:/") else storage.local_path(storage.absolute(model))
    if place is None or (place / FILES[0]).exists() or not (place / "precise").is_dir():
        return DEFAULT_WORKSPACE
    return str(place) if os.access(place, os.W_OK) else DEFAULT_WORKSPACE


def _bundle_at(model: str, config: TrackingConfig) -> str:
    """URI of a bundle, or of that of a workspace; what is neither stays, for its reader says what is missing."""
    uri = storage.absolute(model)
    if storage.exists(storage.join(uri, FILES[0])):
        return uri
    folders = storage.list_dir(storage.join(uri, "precise"))
    found = [_finished(Workspace(uri), storage.name(folder)) for folder in folders]
    made = sorted((item for item in found if item), key=lambda item: str(item.manifest["created"]), reverse=True)
    if len(made) > 1:
        if chosen := _registered(config, Workspace(uri), [item.fingerprint for item in made]):
            taken = next(item for item in made if item.fingerprint == chosen.tags[FINGERPRINT])
            why = "its champion" if CHAMPION in chosen.aliases else "the only one that is registered"
            version, bundle = f"models:/{chosen.name}/{chosen.version}", taken.path("bundle")
            score, better = _compared(Workspace(uri), taken, made)
            Progress().say(f"of the {len(made)} models in {model}, {version} is taken, {why}{score}: {bundle}{better}")
            return bundle
        lines = "".join(f"\n  {_made(item)}" for item in made)
        raise PistoSegError(
            f"has {len(made)} models, the newest first:{lines}",
            file=model,
            remedy=f"give one of them, or models:/NAME@{CHAMPION} (see `pistoseg models list`)",
        )
    if made:
        return made[0].path("bundle")
    name = next(filter(_NAMED.fullmatch, (model, storage.name(model))), None)  # of a job it is in an absolute path
    if name and not storage.exists(uri):
        raise PistoSegError(
            "is no folder",
            file=model,
            remedy=f"write models:/{name} if it is a registered model, and give the --workspace that knows it",
        )
    return uri


def _registered(config: TrackingConfig, workspace: Workspace, keys: Sequence[str]) -> ModelVersion | None:
    """What a workspace with several models is for: the champion, or the only one that is registered.

    A search leaves a model a trial there, and registers none but the best one, if that holds. Where MLflow was away or
    off since, the newest model may be meant though an older one is registered.

    Args:
        config: of the server.
        workspace: that has the models.
        keys: fingerprints of the models, the newest first; where the workspace was before, its bundles' URIs say.
    Returns:
        None where that is not clear, or where a server would have to be asked.
    """
    registry = Registry(config, workspace)
    database = database_file(registry.uri)
    if not database or not database.exists():
        return None
    try:
        versions = [item for item in registry.versions() if item.tags.get(FINGERPRINT) in keys]
    except PistoSegError:  # it can't be opened, which is no reason not to list the models
        return None
    champions = [item for item in versions if CHAMPION in item.aliases]
    found = {item.tags[FINGERPRINT]: item for item in champions or versions}
    if len(found) != 1:
        return None
    key, version = found.popitem()
    return version if champions or SEARCH in version.tags or key == keys[0] else None


def _compared(workspace: Workspace, taken: Artifact, made: Sequence[Artifact]) -> tuple[str, str]:
    """The score of the model of a workspace that is taken, and the best of the others where that is higher."""
    scores: dict[str, dict[str, float]] = {}
    try:
        for artifact in sorted(_scoring(workspace.root), key=lambda item: str(item.manifest["created"])):
            scores.setdefault(_model_of(artifact), {}).update(artifact.summary.get("metrics", {}))
    except PistoSegError:  # a damaged one, which is no reason not to take the model
        return "", ""
    own = scores.get(taken.fingerprint, {})
    for key, title in SCORES.items():
        if key in own:
            best = max(made, key=lambda item: scores.get(item.fingerprint, {}).get(key, own[key]))
            highest = scores.get(best.fingerprint, {}).get(key, own[key])
            better = f"; {best.path('bundle')} has more, {highest:.3f}" if highest > own[key] else ""
            return f" ({title} {own[key]:.3f})", better
    return "", ""


def _finished(workspace: Workspace, key: str) -> Artifact | None:
    """A model of a workspace whose bundle is there."""
    try:
        found = workspace.find("precise", key)
    except UnavailableError:
        raise
    except PistoSegError:  # its manifest is damaged, which a run says
        return None
    return found if found and storage.exists(storage.join(found.path("bundle"), FILES[0])) else None


def _made(artifact: Artifact) -> str:
    """A model of a workspace on a line."""
    scores = artifact.summary.get("metrics", {}).items()
    shown = [f"{name} {value:.3f}" for name, value in scores if name.startswith("validation")]
    return ", ".join([artifact.path("bundle"), f"made {artifact.manifest['created']}", *shown])


class Registry:
    """The models of a server, or of a workspace's database.

    Args:
        config: of the server.
        workspace: where the database is unless the config names a server.
    """

    def __init__(self, config: TrackingConfig, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace
        self.uri = tracking_uri(config, workspace)

    def find(self, model: str) -> ModelVersion:
        """A version: `NAME@ALIAS` or `NAME/VERSION`, with or without `models:/`.

        Raises:
            PistoSegError: it is not there, or the server is away or lets nobody in.
        """
        name, alias, label = model.removeprefix("models:/").partition("@")
        if not alias:
            name, _, label = name.rpartition("/")
        if not name or not label:
            raise PistoSegError(
                "names no version", file=model, remedy="write models:/NAME@ALIAS or models:/NAME/VERSION"
            )
        from mlflow.exceptions import MlflowException

        client = self._client(model)
        with self._readable():
            try:
                found = (client.get_model_version_by_alias if alias else client.get_model_version)(name, label)
            except MlflowException as error:
                if error.error_code not in MISSING:
                    raise
                raise PistoSegError(
                    f"is not in the registry at {self.uri} ({first_line(error)})",
                    file=model,
                    remedy="look at the names and aliases with `pistoseg models list`, or in `pistoseg ui`",
                ) from error
        return _version(found, self._aliases(client, name))

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """All versions, of one model or of all, by name and the newest first.

        Raises:
            PistoSegError: there is no model of that name, or the server is away or lets nobody in.
        """
        client = self._client(name or "models")
        found = []
        with self._readable():
            names = [name] if name else sorted(model.name for model in found_by(client.search_registered_models))
            for each in names:
                versions = found_by(client.search_model_versions, filter_string=f"name={quoted(each)}")
                aliases = self._aliases(client, each)
                found += sorted((_version(item, aliases) for item in versions), key=lambda item: -int(item.version))
        if name and not found:
            raise PistoSegError(
                f"is not in the registry at {self.uri}", file=name, remedy="`pistoseg models list` shows what is"
            )
        return found

    def newest(self, model: str) -> ModelVersion:
        """What a user means by `NAME`, `NAME@ALIAS` or `NAME/VERSION`: without either the newest version."""
        named = model.removeprefix("models:/")
        return self.find(model) if "@" in named or "/" in named else self.versions(named)[0]

    def promote(self, name: str, version: str, alias: str = CHAMPION) -> str | None:
        """Point an alias to a version; the version that had `champion` gets `previous`.

        Returns:
            The version that had the alias before, if another one had it.
        Raises:
            PistoSegError: there is no such version, the alias is refused, or the server is away or lets nobody in.
        """
        from mlflow.exceptions import MlflowException

        found = self.find(f"{name}/{version}")
        with self._readable():
            try:
                return set_alias(self._client(name), name, found.version, alias)
            except MlflowException as error:
                if not is_refusal(error):
                    raise
                raise PistoSegError(
                    f"the alias {alias!r} is refused ({first_line(error)})",
                    file=f"models:/{name}/{found.version}",
                    remedy="name another one, of letters, digits, _ and -",
                ) from error

    def metrics(self, version: ModelVersion) -> dict[str, float]:
        """What its MLflow run measured; empty where that is gone."""
        from mlflow.exceptions import MlflowException

        if not version.run_id:
            return {}
        try:
            return dict(self._client(version.name).get_run(version.run_id).data.metrics)
        except MlflowException:
            return {}

    @contextmanager
    def bundle(self, version: ModelVersion) -> Iterator[str]:
        """URI of a version's bundle while the block runs: in the workspace, else the copy that MLflow keeps."""
        if storage.exists(storage.join(version.bundle, FILES[0])):
            yield version.bundle
            return
        import mlflow
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                with default_server(self.uri):
                    local = mlflow.artifacts.download_artifacts(
                        artifact_uri=f"models:/{version.name}/{version.version}", dst_path=folder
                    )
            except (MlflowException, OSError) as error:
                raise PistoSegError(
                    f"its bundle is not there, and MLflow has no copy ({first_line(error)})",
                    file=version.bundle,
                    remedy=self._where_now(version),
                ) from error
            found = next(Path(local).rglob(FILES[0]), None)
            if found is None:
                raise PistoSegError(
                    "its bundle is not there, and MLflow's copy holds none",
                    file=version.bundle,
                    remedy=self._where_now(version),
                )
            yield str(found.parent)

    def _where_now(self, version: ModelVersion) -> str:
        """Remedy of a bundle that is nowhere."""
        here, is_trains = database_file(self.uri) is not None, SEARCH not in version.tags
        again = "run `pistoseg train` with it again, which registers the model where it is now"
        now = "give the bundle's URI where it is now"  # a server leads nobody to a disk, and no train repeats a search
        return f"if its workspace was moved, {again if here and is_trains else now}"

    def export(self, version: ModelVersion, out: str) -> list[str]:
        """Copy a version's bundle to a folder on any file system; the URIs of its files.

        Raises:
            PistoSegError: the folder holds another bundle, or the version's bundle is gone.
        """
        with self.bundle(version) as bundle:
            content = {name: storage.read_bytes(storage.join(bundle, name)) for name in FILES}
        target = storage.join(out, FILES[0])
        if storage.exists(target) and storage.read_bytes(target) != content[FILES[0]]:
            raise PistoSegError("holds another model", file=out, field="--out", remedy="name an empty folder")
        for name in reversed(FILES):  # model.json, written last, completes it
            storage.write_bytes(storage.join(out, name), content[name])
        return [storage.join(out, name) for name in FILES]

    def _client(self, what: str) -> MlflowClient:
        database = database_file(self.uri)
        if database and not database.exists():
            raise PistoSegError(
                f"can't be looked up: {database} is not there",
                file=what,
                remedy="give --workspace (in Python workspace=) or MLFLOW_TRACKING_URI",
            )
        return connect(self.config, self.workspace)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Say what to do where the server is away or lets nobody in."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            raise PistoSegError(
                f"the registry can't be read ({first_line(error)})",
                file=self.uri,
                remedy="see that the server runs; check tracking.uri or MLFLOW_TRACKING_URI, its user and password",
            ) from error

    def _aliases(self, client: MlflowClient, name: str) -> dict[str, list[str]]:
        """Aliases by version."""
        from mlflow.exceptions import MlflowException

        try:
            aliases = client.get_registered_model(name).aliases
        except MlflowException:
            return {}
        found: dict[str, list[str]] = {}
        for alias, version in aliases.items():
            found.setdefault(str(version), []).append(alias)
        return found


def set_alias(client: MlflowClient, name: str, version: str, alias: str = CHAMPION) -> str | None:
    """Point an alias to a version; as `Registry.promote`."""
    from mlflow.exceptions import MlflowException

    try:
        before = str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException:
        before = None
    if before == version:
        return None
    if before is not None and alias == CHAMPION:
        client.set_registered_model_alias(name, PREVIOUS, before)
    client.set_registered_model_alias(name, alias, version)
    return before


def lineage(bundle: str) -> list[dict[str, Any]]:
    """The artifacts that a bundle was made from, itself first, each once.

    Args:
        bundle: URI of `<workspace>/precise/<fingerprint>/bundle`.
    Returns:
        Manifests, with `uri`; empty where the bundle lies in no workspace.
    """
    folder = bundle.rstrip("/").rsplit("/", 1)[0]
    root = folder.rsplit("/", 2)[0]
    found: dict[str, dict[str, Any]] = {}
    queue = [folder]
    while queue:
        uri = queue.pop(0)
        file = storage.join(uri, MANIFEST)
        if uri in found or not storage.exists(file):
            continue
        manifest = json.loads(storage.read_bytes(file))
        found[uri] = manifest | {"uri": uri}
        queue += [storage.join(root, item["stage"], item["fingerprint"]) for item in manifest["inputs"].values()]
    return list(found.values())


def scored_by(bundle: str) -> list[Artifact]:
    """Artifacts of the same workspace that score a bundle's model."""
    folder = bundle.rstrip("/").rsplit("/", 1)[0]
    root, stage, key = ["", "", *folder.rsplit("/", 2)][-3:]
    if stage != "precise":  # as a hand may have registered it: in no workspace
        return []
    return [artifact for artifact in _scoring(root) if _model_of(artifact) == key]


def newest_scores(bundle: str) -> list[Artifact]:
    """Of `scored_by` the newest evaluation and the newest scores by labels; protocols of evaluations may differ."""
    found = sorted(scored_by(bundle), key=lambda item: str(item.manifest["created"]))
    return list({artifact.stage: artifact for artifact in found}.values())


def _scoring(root: str) -> Iterator[Artifact]:
    """The artifacts of a workspace that score models."""
    for stage in ("evaluation", "label_scores"):
        for uri in storage.list_dir(storage.join(root, stage)):
            artifact = Workspace(root).find(stage, storage.name(uri))
            if artifact:
                yield artifact


def _model_of(artifact: Artifact) -> str:
    """The fingerprint of the model that an artifact scores."""
    return str(artifact.manifest["inputs"].get("model", {}).get("fingerprint"))


def _version(item: Any, aliases: dict[str, list[str]]) -> ModelVersion:
    own = tuple(sorted(aliases.get(str(item.version), ())))
    return ModelVersion(item.name, str(item.version), own, dict(item.tags), item.run_id, int(item.creation_timestamp))
