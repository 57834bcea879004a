"""Any classifier of torchvision for DGL: split into modules of about equal FLOPs (decoupled.networks.decouple)."""

import torch
from torchvision import models

from decoupled import decouple

CLASSIFIERS = tuple(models.list_models(module=models))


def greedy_torchvision(arch, splits=2, classes=1000, image_size=224, convs=3, hidden_layers=3):
    """torchvision's ``arch`` in ``splits`` modules, for images (B, 3, image_size, image_size).

    It is initialized as in torchvision. All modules except the last have an MLP-SR auxiliary with ``convs`` 1×1
    convolutions and ``hidden_layers``; the last keeps the network's own head. GoogLeNet and Inception are used without
    their auxiliary heads. Raises InputError for more splits than the network allows, and for an image size that it does
    not accept.
    """
    settings = {"num_classes": classes}
    if arch in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": False, "init_weights": True}
    elif arch.startswith("vit"):
        settings["image_size"] = image_size
    elif arch.startswith("maxvit"):
        settings["input_size"] = (image_size, image_size)
    model = models.get_model(arch, weights=None, **settings)
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return decouple(model, images, splits=splits, convs=convs, hidden_layers=hidden_layers)
