"""The data sets that `fer data prepare` reads: one file here and one row in `SOURCES` each."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from modeling_fer.data.schema import Item
from modeling_fer.data.sources import aff_wild2, fer2013, folder, frames, streams, synthetic, videos


class Source(NamedTuple):
    """A data set's options (a dataclass, whose fields become command line flags) and its reader."""

    options: type
    examples: Callable[[Any], Iterator[Item]]  # the same items in the same order every time it is called


SOURCES = {
    "fer2013": Source(fer2013.Fer2013Options, fer2013.examples),
    "folder": Source(folder.FolderOptions, folder.examples),
    "synthetic": Source(synthetic.SyntheticOptions, synthetic.examples),
    "aff_wild2": Source(aff_wild2.AffWild2Options, aff_wild2.examples),
    "frames": Source(frames.FramesOptions, frames.examples),
    "videos": Source(videos.VideosOptions, videos.examples),
    "streams": Source(streams.StreamsOptions, streams.examples),
}
