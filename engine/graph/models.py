"""Model files: which inputs name one, and where ComfyUI looks for it.

ComfyUI builds the choices of a loader from the files that are there, and keeps no note of the folder. While node
classes are asked for their inputs, its listing is marked, and the mark travels with the choices.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex

from .findings import Finding, Prompt, any_of, did_you_mean, finding
from .schema import COMBO, InputDefinition, NodeDefinition

#: Folders and models that a message lists.
LISTED = 5


class Listing(list[Any]):
    """File names with the name of ComfyUI's folder that they are from; ``["None"] + listing`` keeps it too."""

    def __init__(self, files: Iterable[Any], folder: str) -> None:
        super().__init__(files)
        self.folder = folder

    def __add__(self, other: Any) -> Listing:
        return Listing([*self, *other], self.folder)

    def __radd__(self, other: Any) -> Listing:
        return Listing([*other, *self], self.folder)

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        item = super().__getitem__(key)
        return Listing(item, self.folder) if isinstance(key, slice) else item


@contextlib.contextmanager
def marked_listings(folder_paths: Any) -> Iterator[list[Listing]]:
    """Inside, ``folder_paths.get_filename_list`` says what folder its answers are from; all of them are collected."""
    original = folder_paths.get_filename_list
    listings: list[Listing] = []

    def get_filename_list(folder_name: str) -> Listing:
        listings.append(Listing(original(folder_name), folder_name))
        return Listing(listings[-1], folder_name)

    folder_paths.get_filename_list = get_filename_list
    try:
        yield listings
    finally:
        folder_paths.get_filename_list = original


def with_folders(definition: NodeDefinition, listings: list[Listing]) -> NodeDefinition:
    """``definition`` with the folders of those choices that lost their mark: V3 schemas copy them.

    listings: all that the class asked for, in the order of its inputs.
    """
    left = list(listings)
    for item in definition.inputs:
        marked = [index for index, listing in enumerate(left) if item.folder and listing.folder == item.folder]
        if marked:
            del left[marked[0]]
    inputs = []
    for item in definition.inputs:
        if left and item.type == COMBO and not item.folder and item.choices == tuple(left[0]):
            item = dataclasses.replace(item, folder=left.pop(0).folder)
        inputs.append(item)
    return dataclasses.replace(definition, inputs=tuple(inputs))


def places(folder: str, folder_paths: Any, directory: Path) -> list[str]:
    """Where ComfyUI looks for files of ``folder``: relative to its directory where they lie inside."""
    try:
        paths = [Path(path) for path in folder_paths.get_folder_paths(folder)]
    except KeyError:  # a pack's own folder that it has not registered
        return [f"models/{folder}"]
    return [
        str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path) for path in paths[:LISTED]
    ]


def missing_model(prompt: Prompt, node_id: str, expected: InputDefinition, where: list[str]) -> Finding:
    """A loader names a file that is not there."""
    given = prompt[node_id]["inputs"][expected.name]
    name = given if isinstance(given, str) else repr(given)
    present = [choice for choice in expected.choices if isinstance(choice, str)]
    near = did_you_mean(Path(name.replace("\\", "/")).name, present)
    remedy = f"put it into {any_of(where)} of ComfyUI"
    if near:
        remedy += f", or did you mean {any_of(near)}?"
    elif present:
        more = f" and {len(present) - LISTED} more" if len(present) > LISTED else ""
        remedy += f"; there are {', '.join(present[:LISTED])}{more}"
    message = f"the model file {name!r} is not there"
    return finding("missing_model", message, remedy, prompt=prompt, node_id=node_id, input=expected.name)
