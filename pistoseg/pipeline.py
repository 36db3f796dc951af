"""The runner of the stages: reuses what is committed, computes the rest in order, and commits it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from pistoseg import object_store, storage
from pistoseg.artifacts import CHECKPOINTS, Artifact, Workspace
from pistoseg.claims import claimed
from pistoseg.config import Config
from pistoseg.errors import PistoSegError
from pistoseg.graph import StageContext, Step, needed, plan
from pistoseg.hooks import Hooks
from pistoseg.progress import Progress
from pistoseg.tracking import Tracker


def check_weights(config: Config, targets: tuple[str, ...]) -> None:
    """Refuse ImageNet weights that nobody has; what else stops a training is seen once it is known what is to do."""
    keys = []
    for stage in needed(config, targets):
        section = getattr(config, stage.name, None)
        if getattr(section, "encoder", None) == "resnet38d" and getattr(section, "weights", None) == "imagenet":
            keys.append(f"{stage.name}.weights")
    if keys:
        raise PistoSegError(
            "no hub and no package has the weights of resnet38d",
            field=", ".join(keys),
            remedy="add --profile cpu, where the preset has it, whose networks need no hub; or set "
            f"{' and '.join(keys)} to the path or URI of its published .pth file, or to null for none; or choose "
            "another encoder and output_stride",
        )


def check_trainings(config: Config, stages: Sequence[str], say: Callable[[str], None]) -> None:
    """Refuse networks that can't be built or trained, or for which there are no ImageNet weights; these are fetched.

    Args:
        config: of the run.
        stages: names of those that are to be computed; the ones that train no network are passed over.
        say: told of batches that are not of the size that is set.
    Raises:
        PistoSegError: naming the setting.
    """
    from pistoseg.stages import placement

    if any(stage in placement.TRAINED for stage in stages):
        from pistoseg.stages import trained

        trained.check_buildable(config, stages)
        trained.check_batches(config, stages, say)
        trained.fetch_weights(config, stages)


def run_pipeline(
    config: Config,
    workspace: Workspace,
    targets: tuple[str, ...] = ("preliminary_evaluation", "evaluation"),
    *,
    progress: Progress | None = None,
    run_name: str | None = None,
    parent_run: str | None = None,
    hooks: Hooks | None = None,
) -> dict[str, Artifact]:
    """Compute the targets and whatever they need; reuse what is there.

    Args:
        config: a validated config whose `data.uri` is set.
        workspace: where artifacts are kept.
        targets: names of stages.
        progress: where to say what happens.
        run_name: of its MLflow run; None: the data set's.
        parent_run: id of the MLflow run that it is a part of; then its model is not registered.
        hooks: called around the stages.
    Returns:
        Artifacts by stage name.
    """
    object_store.use(config.storage)
    progress, hooks = progress or Progress(), hooks or Hooks()
    artifacts: dict[str, Artifact] = {}
    with Tracker.start(config, workspace, run_name, parent_run) as tracker:
        steps = plan(config, targets)
        _check(config, workspace, steps, progress)
        for number, step in enumerate(steps, 1):
            found = step.find(workspace)
            title, name, key = f"[{number}/{len(steps)}] {step.stage.title}", step.stage.name, step.fingerprint
            with progress.stage(title, found is not None, stage=name, fingerprint=key):
                if found is None:
                    inputs = {role: artifacts[source] for role, source in step.inputs.items()}
                    found = _compute(step, inputs, config, workspace, progress, tracker, hooks)
                else:
                    _tidy(found)
                    tracker.reused(found)
                    hooks.reused(found)
                _refuse_rejected(found, config)
            artifacts[step.stage.name] = found
        tracker.finish(artifacts)
    return artifacts


def _tidy(artifact: Artifact) -> None:
    """Remove the checkpoints of a run that was killed when it had just finished an artifact."""
    from pistoseg.stages.placement import TRAINED

    if artifact.stage in TRAINED:
        checkpoints = artifact.path(CHECKPOINTS)
        with suppress(OSError, PistoSegError):  # the artifact may be another's, who alone may write it
            if storage.exists(checkpoints):
                storage.remove_tree(checkpoints)


def _refuse_rejected(artifact: Artifact, config: Config) -> None:
    """Hold images that were read under another limit against that of the config."""
    if artifact.stage == "patches" and artifact.summary.get("rejected"):
        from pistoseg.stages.patches import refuse_rejected

        refuse_rejected(artifact.summary, config.data, artifact.path("rejected.parquet"))


def _check(config: Config, workspace: Workspace, steps: list[Step], progress: Progress) -> None:
    """Refuse networks that can't be built or trained, and what the cluster can't give, before the first stage runs."""
    from pistoseg.stages import placement

    todo = [step.stage.name for step in steps if step.find(workspace) is None]
    check_trainings(config, todo, progress.say)
    if todo:
        read = {"data.uri": config.data.uri, "data.validation": config.data.validation}
        placement.check_shared(workspace.root, read)
        placement.check(config, todo, progress.say)


def _compute(
    step: Step,
    inputs: dict[str, Artifact],
    config: Config,
    workspace: Workspace,
    progress: Progress,
    tracker: Tracker,
    hooks: Hooks,
) -> Artifact:
    from pistoseg.stages import placement

    stage, key, settings = step.stage, step.fingerprint, step.settings
    placement.check(config, (stage.name,), progress.say)
    folder = workspace.folder(stage.name, key)
    with claimed(folder, lambda: step.find(workspace) is not None, progress.say) as claim:
        if claim is None:  # another run has made it in the meantime
            artifact = step.find(workspace)
            assert artifact is not None
            progress.say(f"{stage.name}/{key}: another run has finished it, reused")
            tracker.reused(artifact)
            hooks.reused(artifact)
            return artifact
        storage.remove_parts(folder)
        with tracker.stage(stage.name, key, settings, inputs) as run:
            started = time.monotonic()
            callbacks = hooks.train_callbacks(step)
            context = StageContext(config, folder, inputs, progress, run, callbacks, check=claim.check)
            hooks.begun(step)
            summary = stage.run(context)
            claim.check()
            artifact = workspace.commit(
                stage.name,
                key,
                version=stage.version,
                settings=settings,
                inputs=inputs,
                summary=summary,
                seconds=time.monotonic() - started,
            )
            run.finish(artifact)
            for tidy in context.afterwards:
                with suppress(OSError, PistoSegError):  # what is left takes room and harms nothing
                    tidy()
    return artifact
