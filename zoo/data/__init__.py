"""Data modules: images with labels or conversations, resumable order, clear errors and counted failures."""

from zoo.data.base import ImageData
from zoo.data.captioned_shapes import CaptionedShapes
from zoo.data.captions import CaptionedImages
from zoo.data.conversations import Conversations
from zoo.data.digits import Digits
from zoo.data.folder import ImageFolder
from zoo.data.framing import Framing
from zoo.data.hub import HubImages
from zoo.data.images import ImageList
from zoo.data.latents import CachedLatents
from zoo.data.questions import ImageQuestions
from zoo.data.shapes import Shapes
from zoo.data.shards import TarShards
from zoo.data.transforms import Augment, View

__all__ = [
    'Augment',
    'CachedLatents',
    'CaptionedImages',
    'CaptionedShapes',
    'Conversations',
    'Digits',
    'Framing',
    'HubImages',
    'ImageData',
    'ImageFolder',
    'ImageList',
    'ImageQuestions',
    'Shapes',
    'TarShards',
    'View',
]
