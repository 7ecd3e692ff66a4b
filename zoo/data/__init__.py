"""Data modules: images with labels or conversations, resumable order, clear errors and counted failures."""

from zoo.data.base import ImageData
from zoo.data.captioned_shapes import CaptionedShapes
from zoo.data.captions import CaptionedImages
from zoo.data.conversations import Conversations
from zoo.data.detection import BoxAugment, CocoObjects, DrawnObjects
from zoo.data.digits import Digits
from zoo.data.folder import ImageFolder
from zoo.data.framing import Framing
from zoo.data.hub import HubImages
from zoo.data.hub_objects import HubObjects
from zoo.data.images import ImageList
from zoo.data.latents import CachedLatents
from zoo.data.questions import ImageQuestions
from zoo.data.segmentation import Cityscapes, DrawnMasks, HubMasks, MaskAugment, MaskFolder, MaskView
from zoo.data.shapes import Shapes
from zoo.data.shards import TarShards
from zoo.data.transforms import Augment, View

__all__ = [
    'Augment',
    'BoxAugment',
    'CachedLatents',
    'CaptionedImages',
    'CaptionedShapes',
    'Cityscapes',
    'CocoObjects',
    'Conversations',
    'Digits',
    'DrawnMasks',
    'DrawnObjects',
    'Framing',
    'HubImages',
    'HubMasks',
    'HubObjects',
    'ImageData',
    'ImageFolder',
    'ImageList',
    'ImageQuestions',
    'MaskAugment',
    'MaskFolder',
    'MaskView',
    'Shapes',
    'TarShards',
    'View',
]
