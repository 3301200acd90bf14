"""What `addp app` shows of an uploaded image: its features and attention, and the nearest images of a dataset."""

from collections.abc import Iterator

import torch
from torchvision.transforms.functional import to_pil_image

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError, eval_transform
from gen.encoder_figures import EncoderView, attention_maps, block_titles, feature_maps
from gen.neighbors import ImagePool
from gen.page_actions import Limits, Result, Wanted
from gen.page_html import Section, tile
from gen.uploads import NOT_AN_IMAGE, open_upload

NO_IMAGE = "Upload an image first."
NEIGHBORS = 12  # that are shown
NAME_PARTS = 2  # the last parts of a path, that tell images apart


class FeatureActions:
    """What the page does with an encoder. Raises UserError, which the page displays, if an upload is no image.

    pool: the images among which neighbors are looked for, if any.
    """

    def __init__(self, view: EncoderView, limits: Limits, pool: ImagePool | None = None):
        self.view, self.limits, self.pool = view, limits, pool

    def describe(self, wanted: Wanted, path: str | None) -> Iterator[Result]:
        """Yield the features of the image in a file, then its neighbors, while they are wanted."""
        if not path:
            raise UserError(NO_IMAGE)
        upload = open_upload(path, self.limits.pixels)
        height, width = self.view.encoder.image_size
        try:
            image = eval_transform((height, width))(upload)[None]
        except ImageError as error:
            raise UserError(NOT_AN_IMAGE) from error
        if not wanted():
            yield Result("Stopped before the first block.")
            return
        note = f"The encoder sees the central part, at {width} x {height} pixels."
        titles = block_titles(self.view)
        tiles = [tile(to_pil_image(image[0]), "image")]
        for title, colors in zip(titles, feature_maps(self.view, image), strict=True):
            tiles.append(tile(to_pil_image(colors[0].clamp(0, 1)), title))
        sections = [Section("patch features: their first three principal components as red, green and blue", tiles)]
        try:
            maps = attention_maps(self.view, image)
        except ValueError as error:
            note += f" Attention is not shown: {error}."
        else:
            tiles = [tile(to_pil_image(each[0].clamp(0, 1)), title) for title, each in zip(titles, maps, strict=True)]
            sections.append(Section("attention of the class token, from violet (least) to yellow (most)", tiles))
        yield Result(note, sections)
        if self.pool is None:
            yield Result(f"{note} Start the app with data=<images> to see its nearest neighbors.")
            return
        for count in self.pool.describe():
            if not wanted():
                yield Result(f"{note} Stopped: the features of {count} of {len(self.pool)} images are there.")
                return
            yield Result(f"{note} Reading the images of data: {count} of {len(self.pool)}.")
        yield Result(note, [*sections, self._neighbors(image)])

    def _neighbors(self, image: torch.Tensor) -> Section:
        assert self.pool is not None
        tiles = []
        for index, similarity in self.pool.nearest(self.view.descriptors(image)[0], NEIGHBORS):
            name = "/".join(self.pool.source.name(index).split("/")[-NAME_PARTS:])
            tiles.append(tile(to_pil_image(self.pool.image(index)), f"{similarity:.2f}, {name}"))
        title = f"nearest of {len(self.pool)} images, by the cosine of the averages of the last block's patch features"
        return Section(title, tiles)
