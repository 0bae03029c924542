"""Labelled images: where they come from, how they are split, augmented and fed to the device."""

from neuroexapt.data.augment import Augmentation, augment, normalise
from neuroexapt.data.dataset import ImageDataset, ImagePart, ResidentImages, StreamedImages
from neuroexapt.data.loaders import Loader, ResidentLoader, StreamingLoader, make_loader, split_indices
from neuroexapt.data.sources import DATASETS, DatasetSpec, load_dataset

__all__ = [
    "DATASETS",
    "Augmentation",
    "DatasetSpec",
    "ImageDataset",
    "ImagePart",
    "Loader",
    "ResidentImages",
    "ResidentLoader",
    "StreamedImages",
    "StreamingLoader",
    "augment",
    "load_dataset",
    "make_loader",
    "normalise",
    "split_indices",
]
