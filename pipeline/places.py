"""Words that name files, made absolute: workers and later commands run in other folders.

Links are kept as they are, since names speak: a hub's cache links to files without an ending, and
an annotation file's name, or its folder's, says whether one may train on it.
"""

from pathlib import Path

from pipeline.teacher_source import names_files


def absolute_split(split: str) -> str:
    """Returns KIND:IMAGES_DIR:ANNOTATIONS.json or voc:VOCDEVKIT_DIR:LIST from the root down."""
    kind, _, rest = split.partition(":")
    folder, colon, file = rest.rpartition(":")
    if not colon or not folder or not file:
        return split
    listed = file if kind == "voc" else absolute(file)  # VOC's is a name below its folder
    return f"{kind}:{absolute(folder)}:{listed}"


def absolute_teacher(spec: str) -> str:
    """Returns MODEL:/path from the root down; a tag, `random` and a short name as they are."""
    model, _, source = spec.partition(":")
    if not names_files(source):
        return spec
    return f"{model}:{Path(source).expanduser().absolute()}"


def absolute_proposals(proposals: str) -> str:
    """Returns KIND:PATH from the root down, what follows the path included."""
    kind, _, path = proposals.partition(":")
    return f"{kind}:{absolute(path)}" if path else proposals


def absolute_experiment(experiment: str | None) -> str | None:
    """Returns an experiment's file from the root down; a shipped name as it is."""
    if experiment is None or Path(experiment).suffix != ".toml":
        return experiment
    return absolute(experiment)


def absolute(path: str) -> str:
    """Returns a path from the root down."""
    return str(Path(path).absolute())
