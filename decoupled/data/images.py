"""Reading one image, and the form in which a network reads it."""

import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps
from torch.nn import functional as F

from decoupled.errors import InputError

SIDE = 32  # every data set here is brought to 32×32


class InputForm(NamedTuple):
    """What a network reads and what it tells: saved with it, so that it can be used on other images.

    classes    their names, in the order of the logits
    mean, std  of each channel in [0, 1], by which images are normalized
    resize     the shorter side of an image is brought to this,
    crop       the centre of this side kept,
    size       and zeros put around it up to this
    grey       color is taken away; the three channels are the same
    """

    classes: list
    mean: tuple
    std: tuple
    resize: int = SIDE
    crop: int = SIDE
    size: int = SIDE
    grey: bool = False

    def read(self, path):
        """The image at ``path``: uint8 (size, size, 3). Raises InputError for a file that is missing or no image."""
        from PIL import Image
        from torchvision.transforms.v2 import functional as transforms

        if not Path(path).is_file():
            raise InputError(f"{path} is missing: name an image file")
        image = read_image(path).convert("L" if self.grey else "RGB")
        square = self.crop, self.crop
        if self.resize == self.crop and image.size != square:  # as image folders of small images are read
            image = ImageOps.fit(image, square, Image.Resampling.BILINEAR)
        pixels = transforms.pil_to_tensor(image)
        pixels = transforms.center_crop(transforms.resize(pixels, self.resize, antialias=True), self.crop)
        return F.pad(pixels, ((self.size - self.crop) // 2,) * 4).expand(3, -1, -1).permute(1, 2, 0)


EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}  # modes


def read_image(path):
    """The image at ``path`` as Pillow's RGB. Raises InputError, naming it, for one that is damaged, cannot be read, is
    too large for Pillow, or has more than the 8 bits a channel that would be kept of it.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # of large images, odd transparency, damaged metadata
            with Image.open(file) as image:
                if image.mode in EIGHT_BITS:
                    return image.convert("RGB")
                mode = image.mode
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} has more pixels than Pillow reads ({error}): make it smaller") from error
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder stumbles over in a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged or no image ({reason}): replace it") from error
    raise InputError(f"{path} has values of more than 8 bits (mode {mode}), most of which would be lost: convert it")
