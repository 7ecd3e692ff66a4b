"""Data modules: images and labels with resumable order, clear errors and counted failures."""

from zoo.data.base import ImageData
from zoo.data.digits import Digits
from zoo.data.folder import ImageFolder
from zoo.data.hub import HubImages
from zoo.data.images import ImageList
from zoo.data.shapes import Shapes
from zoo.data.shards import TarShards
from zoo.data.transforms import Augment, View

__all__ = ['Augment', 'Digits', 'HubImages', 'ImageData', 'ImageFolder', 'ImageList', 'Shapes', 'TarShards', 'View']
