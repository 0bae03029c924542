"""Labelled images and histories of items: where they come from, how they are split and fed to the device."""

from neuroexapt.data.augment import Augmentation, augment, normalise
from neuroexapt.data.dataset import ImageDataset
from neuroexapt.data.loaders import Loader, ResidentLoader, StreamingLoader, make_loader, split_indices
from neuroexapt.data.parts import ImagePart, ResidentImages, StreamedImages
from neuroexapt.data.sequences import SequenceDataset
from neuroexapt.data.sources import DATASETS, AnyDataset, DatasetSpec, load_dataset

__all__ = [
    "DATASETS",
    "AnyDataset",
    "Augmentation",
    "DatasetSpec",
    "ImageDataset",
    "ImagePart",
    "Loader",
    "ResidentImages",
    "ResidentLoader",
    "SequenceDataset",
    "StreamedImages",
    "StreamingLoader",
    "augment",
    "load_dataset",
    "make_loader",
    "normalise",
    "split_indices",
]
