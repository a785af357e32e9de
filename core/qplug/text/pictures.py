"""Pictures in conversations: files of this machine, read without trust."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from qplug.api import Conversation
from qplug.errors import QplugError, reason
from qplug.files.regular import read_bytes

#: The longest file of a picture, in bytes.
_MAX_BYTES = 64 << 20
#: Formats that Pillow decodes itself; for others it starts programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
#: The keys under which a part of a message names its picture.
_KEYS = ("path", "url", "image", "image_url")


def has_pictures(conversation: Conversation) -> bool:
    """Whether a message of ``conversation`` has a picture.

    Raises QplugError for a part of a message that is neither text nor a picture.
    """
    return any(True for _ in _pictures(conversation))


def pictures_of(conversation: Conversation) -> list[Any]:
    """Returns the pictures of ``conversation``, in order, as RGB images of Pillow.

    Raises QplugError if Pillow is not installed, or if a picture cannot be read or does not lie in
    the folder of pictures.
    """
    return [_picture(conversation, part) for part in _pictures(conversation)]


def is_picture(part: Mapping[str, Any]) -> bool:
    """Whether the ``part`` of a message is a picture."""
    return part.get("type") in ("image", "image_url")


def _pictures(conversation: Conversation) -> Iterator[Mapping[str, Any]]:
    for message in conversation.messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if is_picture(part):
                yield part
            elif part.get("type") != "text":
                kind = part.get("type")
                raise QplugError(
                    f"{conversation.where}: a message has a part of type {kind!r}; qplug reads "
                    "text and image"
                )


def _picture(conversation: Conversation, part: Mapping[str, Any]) -> Any:
    where = conversation.where
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise QplugError(
            f"{where}: the package pillow is needed: pip install 'qplug[vision]' ({error})"
        ) from error
    path = _path(conversation, part)
    try:
        content = read_bytes(path, _MAX_BYTES)
    except FileNotFoundError:
        raise QplugError(f"{where}: {path}: no such picture") from None
    except QplugError as error:
        raise QplugError(f"{where}: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a picture of too many pixels is a warning
            with Image.open(BytesIO(content), formats=_FORMATS) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise anything for a broken file
        raise QplugError(f"{where}: {path}: cannot be read: {reason(error)}") from error


def _path(conversation: Conversation, part: Mapping[str, Any]) -> Path:
    """Returns the path of a picture. Raises QplugError if it leads out of the folder."""
    where, folder = conversation.where, conversation.pictures
    given = next((part[key] for key in _KEYS if key in part), None)
    name = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(name, str) or not name or "\0" in name:
        raise QplugError(f"{where}: a picture has no path: write {{'type': 'image', 'path': ...}}")
    if folder is None or "://" in name or name.startswith("data:"):
        raise QplugError(
            f"{where}: {name[:60]}: only files are read as pictures: save it, and give its path"
        )
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # before Python 3.13, RuntimeError: a loop of links
        raise QplugError(f"{where}: {path}: cannot be read: {reason(error)}") from error
    if not inside:
        raise QplugError(
            f"{where}: {name}: is outside of {folder}; put it there, or give the folder of all "
            "pictures: --dataset-opt pictures=FOLDER"
        )
    return path
