"""Files that visitors of `addp app` upload: bounded, and read only in the formats that images of datasets may have."""

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError, LazyImage

NOT_AN_IMAGE = "The uploaded file cannot be read as an image: upload a complete JPEG, PNG or WebP file."

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class BoundedBodies:
    """ASGI middleware that refuses requests of more than `limit` bytes: gradio bounds files alone."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        length = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if length.isdecimal() and int(length) > self.limit:
            await send({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body", "body": b"too large"})
            return
        received = 0

        async def receive_within_limit() -> Message:  # a request need not say its length
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= self.limit else {"type": "http.disconnect"}

        await self.app(scope, receive_within_limit if scope["type"] == "http" else receive, send)


def open_upload(file: bytes | str | Path, max_pixels: int) -> LazyImage:
    """Return an uploaded image, of which only the header is read. file: its content, or its path.

    Raises UserError if it is none, or too large.
    """
    try:
        image = LazyImage(file if isinstance(file, bytes) else Path(file).read_bytes())
    except (ImageError, OSError) as error:
        if "decompression bomb" in str(error):
            raise UserError(
                f"The image has far too many pixels, expected at most {max_pixels} in all: upload a smaller one."
            ) from error
        raise UserError(NOT_AN_IMAGE) from error
    check_pixels(image.width, image.height, max_pixels)
    return image


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise UserError if an image is too large."""
    if width * height > max_pixels:
        raise UserError(
            f"The image has {width} x {height} pixels, expected at most {max_pixels} in all: upload a smaller one."
        )
